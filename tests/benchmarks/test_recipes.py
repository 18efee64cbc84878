import itertools

import config
from benchmarks import recipes


def test_recipes_endWithTheDefault():
    """The last recipe changes nothing, and the first is the document's; each adds to the one before."""
    names = list(recipes.RECIPES)
    assert recipes.RECIPES[names[0]] == config.DOCUMENT and recipes.RECIPES[names[-1]] == {}
    for before, after in itertools.pairwise(names[:-1]):
        changed = {name for name, value in recipes.RECIPES[after].items() if recipes.RECIPES[before][name] != value}
        assert 1 <= len(changed) <= 3, after
