'use strict';

const facts = JSON.parse(document.getElementById('facts').textContent);
const byId = (id) => document.getElementById(id);
const make = (tag, text, parent) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
};

// Light and dark

const theme = () =>
  document.documentElement.dataset.theme || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light');
const keep = (name, value) => {
  try { // a page opened from a file may have no storage
    if (value === undefined) return localStorage.getItem(name);
    localStorage.setItem(name, value);
  } catch { /* the choice then lasts as long as the page */ }
  return null;
};
if (['light', 'dark'].includes(keep('theme'))) document.documentElement.dataset.theme = keep('theme');
byId('theme').addEventListener('click', () => {
  document.documentElement.dataset.theme = theme() === 'dark' ? 'light' : 'dark';
  keep('theme', theme());
});

// The table: sorted and filtered

const body = document.querySelector('#table tbody');
const rows = [...body.rows];
const heads = [...document.querySelectorAll('#table thead th')];
const order = byId('order');

const sortBy = (column, isDown) => {
  const isText = heads[column].dataset.kind === 'text';
  const valueOf = (row) => row.cells[column].dataset.value;
  const compare = (a, b) => {
    const [first, second] = [valueOf(a), valueOf(b)];
    if (first === '' || second === '') return (first === '') - (second === ''); // what is not known comes last
    const difference = isText ? first.localeCompare(second, undefined, { numeric: true }) : first - second;
    return isDown ? -difference : difference;
  };
  body.append(...rows.sort(compare));
  heads.forEach((head) => head.removeAttribute('aria-sort'));
  heads[column].setAttribute('aria-sort', isDown ? 'descending' : 'ascending');
  order.value = `${column} ${isDown ? 'down' : 'up'}`;
};

const filter = () => {
  const words = byId('find').value.toLowerCase().split(/\s+/).filter(Boolean);
  const kind = byId('kind').value;
  for (const row of rows) {
    const kinds = JSON.parse(row.dataset.kinds);
    const text = `${row.querySelector('.name').dataset.value} ${row.querySelector('.warnings').textContent}`.toLowerCase();
    const isKind = { '': true, '*': kinds.length > 0, '-': kinds.length === 0 }[kind] ?? kinds.includes(kind);
    row.hidden = !(isKind && words.every((word) => text.includes(word)));
  }
  const count = rows.filter((row) => !row.hidden).length;
  byId('count').textContent = `${count} of ${rows.length} patients`;
};

make('option', 'the page’s own order', order).value = '';
heads.forEach((head, column) => {
  const button = head.querySelector('button');
  if (!button) return;
  button.addEventListener('click', () => {
    const now = head.getAttribute('aria-sort');
    // numbers: the lowest Dice first, but the most warnings
    const isDown = now ? now === 'ascending' : head.classList.contains('warnings');
    sortBy(column, isDown);
  });
  const name = [...button.childNodes].map((node) => node.textContent).join(' ');
  make('option', `${name}, up`, order).value = `${column} up`;
  make('option', `${name}, down`, order).value = `${column} down`;
});
order.addEventListener('change', () => {
  const [column, direction] = order.value.split(' ');
  if (direction) return sortBy(Number(column), direction === 'down');
  heads.forEach((head) => head.removeAttribute('aria-sort'));
  body.append(...rows.sort((a, b) => a.dataset.index - b.dataset.index));
});
byId('find').addEventListener('input', filter);
byId('kind').addEventListener('change', filter);
filter();

// The viewer: three planes of one patient

const AXES = { axial: [0, 1, 2], coronal: [0, 2, 1], sagittal: [1, 2, 0] }; // to the right, up, through
const TRUTH = 16; // a packed label is the predicted class + 16 x the true class
const MODES = ['prediction', 'truth', 'both', 'errors', 'image'];
const PIXELS = 2; // of the canvas, per mm
const colorOf = (text) => [1, 3, 5].map((place) => parseInt(text.slice(place, place + 2), 16));
const classColors = facts.classes.map(([, color]) => colorOf(color));
const errorColors = facts.errors.map(([, color]) => colorOf(color));
const viewer = byId('viewer');
const planes = [...document.querySelectorAll('.plane')].map((figure) => ({
  figure,
  axes: AXES[figure.dataset.plane],
  canvas: figure.querySelector('canvas'),
  slider: figure.querySelector('input'),
  output: figure.querySelector('output'),
}));
let shown = null; // the open patient
let mode = 'both';
let modality = null;

const bytesOf = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

const inflate = async (base64) => {
  const stream = new Blob([bytesOf(base64)]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
};

// Return the greys of a packed image as one array, first axis fastest
const decode = async (uri, size, columns) => {
  const picture = new Image();
  picture.src = uri;
  await picture.decode();
  const canvas = make('canvas');
  [canvas.width, canvas.height] = [picture.width, picture.height];
  const context = canvas.getContext('2d', { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
  const [width, height, depth] = size;
  const volume = new Uint8Array(width * height * depth);
  for (let z = 0; z < depth; z++) {
    const left = (z % columns) * width;
    const top = Math.floor(z / columns) * height;
    for (let y = 0; y < height; y++) {
      const from = (top + height - 1 - y) * canvas.width + left;
      for (let x = 0; x < width; x++) volume[x + width * (y + height * z)] = pixels[4 * (from + x)];
    }
  }
  return volume;
};

// Draw the image of a plane, smoothed to the size of the canvas
const drawImage = (plane, context) => {
  const { canvas, axes } = plane;
  context.fillStyle = '#000';
  context.fillRect(0, 0, canvas.width, canvas.height);
  const volume = shown.volumes[modality];
  if (!volume) return;
  const { coarse, size } = shown.packed;
  const [right, up, through] = axes;
  const strides = [1, coarse[0], coarse[0] * coarse[1]];
  const slice = Math.min(Math.floor(((shown.at[through] + 0.5) * coarse[through]) / size[through]), coarse[through] - 1);
  const small = make('canvas');
  [small.width, small.height] = [coarse[right], coarse[up]];
  const pixels = new ImageData(small.width, small.height);
  for (let v = 0; v < coarse[up]; v++) {
    for (let u = 0; u < coarse[right]; u++) {
      const grey = volume[u * strides[right] + v * strides[up] + slice * strides[through]];
      pixels.data.set([grey, grey, grey, 255], 4 * ((coarse[up] - 1 - v) * small.width + u));
    }
  }
  small.getContext('2d').putImageData(pixels, 0, 0);
  context.imageSmoothingQuality = 'high';
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
};

// Return the packed labels of a plane at the size of the canvas
const labelsOf = (plane) => {
  const { canvas, axes: [right, up, through] } = plane;
  const { size, labelStart, labelSize } = shown.packed;
  const found = new Uint8Array(canvas.width * canvas.height);
  const strides = [1, labelSize[0], labelSize[0] * labelSize[1]];
  const slice = shown.at[through] - labelStart[through];
  if (slice < 0 || slice >= labelSize[through]) return found;
  for (let y = 0; y < canvas.height; y++) {
    const v = size[up] - 1 - Math.floor((y * size[up]) / canvas.height) - labelStart[up];
    if (v < 0 || v >= labelSize[up]) continue;
    for (let x = 0; x < canvas.width; x++) {
      const u = Math.floor((x * size[right]) / canvas.width) - labelStart[right];
      if (u < 0 || u >= labelSize[right]) continue;
      found[y * canvas.width + x] = shown.labels[u * strides[right] + v * strides[up] + slice * strides[through]];
    }
  }
  return found;
};

// Return whether a pixel lies on the inner edge of its class
const isEdge = (classes, place, width) => {
  const own = classes[place];
  return [1, 2, -1, -2, width, 2 * width, -width, -2 * width].some((step) => classes[place + step] !== own);
};

const drawLabels = (plane, context) => {
  const { width, height } = plane.canvas;
  const labels = labelsOf(plane);
  const predicted = labels.map((label) => label % TRUTH);
  const truth = labels.map((label) => Math.floor(label / TRUTH));
  const pixels = context.getImageData(0, 0, width, height);
  const mix = (place, color, part) => {
    for (let band = 0; band < 3; band++) {
      const index = 4 * place + band;
      pixels.data[index] = (1 - part) * pixels.data[index] + part * color[band];
    }
  };
  const opacity = byId('opacity').value / 100;
  labels.forEach((label, place) => {
    if (!label) return;
    const [p, t] = [predicted[place], truth[place]];
    if (mode === 'errors') {
      // false negative, false positive, wrong class
      if (p !== t) mix(place, errorColors[p === 0 ? 0 : t === 0 ? 1 : 2], Math.max(opacity, 0.3));
    } else if (mode === 'truth') {
      if (t) mix(place, classColors[t], opacity);
    } else if (p) {
      mix(place, classColors[p], opacity);
    }
    // the outline of the truth over the prediction: its color, and white on the outer border of the tumor
    if (mode === 'both' && t && isEdge(truth, place, width)) mix(place, classColors[t], 1);
  });
  if (mode === 'both') {
    const step = [1, -1, width, -width];
    truth.forEach((t, place) => {
      if (!t && step.some((by) => truth[place + by])) mix(place, [255, 255, 255], 1);
    });
  }
  context.putImageData(pixels, 0, 0);
};

const drawCross = (plane, context) => {
  const [right, up] = plane.axes;
  const { width, height } = plane.canvas;
  const x = ((shown.at[right] + 0.5) * width) / shown.packed.size[right];
  const y = height - ((shown.at[up] + 0.5) * height) / shown.packed.size[up];
  context.strokeStyle = 'rgb(255 255 255 / .45)';
  const gap = 14;
  for (const [x0, y0, x1, y1] of [[0, y, x - gap, y], [x + gap, y, width, y], [x, 0, x, y - gap], [x, y + gap, x, height]]) {
    context.beginPath();
    context.moveTo(x0, y0);
    context.lineTo(x1, y1);
    context.stroke();
  }
};

const draw = () => {
  if (!shown) return;
  const { start, shape } = shown.packed;
  for (const plane of planes) {
    const context = plane.canvas.getContext('2d', { willReadFrequently: true });
    const through = plane.axes[2];
    drawImage(plane, context);
    if (mode !== 'image') drawLabels(plane, context);
    if (byId('cross').checked) drawCross(plane, context);
    plane.slider.value = shown.at[through];
    plane.output.textContent = `${start[through] + shown.at[through]} of ${shape[through]}`;
  }
  byId('legend').replaceChildren();
  const entries = mode === 'errors' ? facts.errors : facts.classes.slice(1);
  const volumes = shown.classVolumes;
  entries.forEach(([name, color], number) => {
    const ml = (which) => volumes[which]?.[number + 1];
    if (mode !== 'errors' && !ml('prediction') && !ml('truth') && number + 1 >= facts.numClasses) return; // of other editions
    const entry = make('li', undefined, byId('legend'));
    make('i', undefined, entry).style.background = color;
    const parts = ['prediction', 'truth'].filter((which) => volumes[which]).map((which) => `${ml(which).toFixed(1)} ml ${which}`);
    entry.append(mode === 'errors' ? name : `${name}: ${parts.join(', ')}`);
  });
  if (mode === 'both') make('li', 'filled: prediction; outlined in white: truth', byId('legend'));
};

const choose = (fieldset, names, checked, onChange) => {
  fieldset.querySelectorAll('label').forEach((label) => label.remove());
  for (const name of names) {
    const label = make('label', undefined, fieldset);
    const input = make('input', undefined, label);
    Object.assign(input, { type: 'radio', name: fieldset.id, value: name, checked: name === checked });
    input.addEventListener('change', () => onChange(name));
    label.append(name);
  }
};

const setMode = (name) => {
  mode = name;
  const input = [...byId('modes').querySelectorAll('input')].find((each) => each.value === name);
  if (input) input.checked = true;
  draw();
};

const fillDetails = () => {
  const table = byId('details');
  table.replaceChildren();
  const columns = [['volume', 'predicted, ml', 2], ['truth', 'true, ml', 2], ['dice', 'Dice', 3], ['hd95', 'HD95, mm', 1], ['expected', 'predicted Dice', 2]];
  const all = Object.values(shown.rows);
  const used = columns.filter(([name]) => all.some((row) => row[name] !== undefined));
  const head = make('tr', undefined, make('thead', undefined, table));
  make('th', 'region', head);
  used.forEach(([, text]) => { make('th', text, head).className = 'number'; });
  const lines = make('tbody', undefined, table);
  for (const [region, row] of Object.entries(shown.rows)) {
    const line = make('tr', undefined, lines);
    make('td', region, line);
    for (const [name, , digits] of used) {
      const value = row[name];
      let text = value === undefined || value === null ? '–' : value;
      if (typeof value === 'number') text = value.toFixed(digits);
      if (Array.isArray(value)) {
        const [expected, low, high] = value;
        text = expected === null ? '–' : expected.toFixed(digits);
        if (low !== null && high !== null) text += ` (${low.toFixed(digits)} to ${high.toFixed(digits)})`;
      }
      make('td', text, line).className = 'number';
    }
  }
};

const open = async (row) => {
  const data = JSON.parse(byId(`case-${row.dataset.index}`).textContent);
  shown = null;
  byId('viewer-name').textContent = data.patient;
  byId('message').textContent = 'Opening …';
  if (!viewer.open) viewer.showModal();
  viewer.dataset.index = row.dataset.index;
  const { packed } = data;
  const names = Object.keys(packed.images);
  try {
    const [labels, ...volumes] = await Promise.all([
      inflate(packed.labels),
      ...names.map((name) => decode(packed.images[name], packed.coarse, packed.columns)),
    ]);
    if (viewer.dataset.index !== row.dataset.index) return; // another patient was opened meanwhile
    shown = { ...data, labels, at: [...packed.focus], volumes: Object.fromEntries(names.map((name, i) => [name, volumes[i]])) };
  } catch (error) {
    byId('message').textContent = `This browser cannot show the volumes (${error}); one of 2023 or later is needed.`;
    return;
  }
  const messages = data.warnings.map(([kind, text]) => `${kind}: ${text}`);
  if (!names.length) messages.push('no image of this patient was given, so that only the segmentation is shown');
  byId('message').textContent = messages.join('; ');
  if (!names.includes(modality)) modality = names[0];
  const modes = packed.hasTruth ? MODES : ['prediction', 'image'];
  if (!modes.includes(mode)) mode = 'prediction';
  choose(byId('modes'), modes, mode, setMode);
  choose(byId('modalities'), names, modality, (name) => { modality = name; draw(); });
  for (const { axes: [right, up, through], canvas, slider } of planes) {
    const mm = packed.spacing.map((spacing, axis) => spacing * packed.size[axis]);
    [canvas.width, canvas.height] = [right, up].map((axis) => Math.min(Math.max(1, Math.round(PIXELS * mm[axis])), 1200));
    slider.max = packed.size[through] - 1;
  }
  fillDetails();
  draw();
};

const step = (by) => {
  const visible = [...body.rows].filter((row) => !row.hidden && row.classList.contains('opens'));
  const place = visible.findIndex((row) => row.dataset.index === viewer.dataset.index);
  const next = visible[place + by];
  if (next) open(next);
};

body.addEventListener('click', (event) => {
  const row = event.target.closest('tr.opens');
  if (row) open(row);
});
byId('before').addEventListener('click', () => step(-1));
byId('after').addEventListener('click', () => step(1));
byId('close').addEventListener('click', () => viewer.close());
viewer.addEventListener('click', (event) => { if (event.target === viewer) viewer.close(); });
viewer.addEventListener('close', () => {
  const row = rows.find((each) => each.dataset.index === viewer.dataset.index);
  if (row) row.querySelector('.open').focus();
  shown = null;
});
viewer.addEventListener('keydown', (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === '[') step(-1);
  if (event.key === ']') step(1);
  const name = MODES[Number(event.key) - 1];
  if (shown && name && (shown.packed.hasTruth || ['prediction', 'image'].includes(name))) setMode(name);
});
byId('opacity').addEventListener('input', draw);
byId('cross').addEventListener('change', draw);
for (const plane of planes) {
  const { canvas, slider, axes: [right, up, through] } = plane;
  slider.addEventListener('input', () => {
    if (!shown) return;
    shown.at[through] = Number(slider.value);
    draw();
  });
  canvas.addEventListener('wheel', (event) => {
    if (!shown) return;
    event.preventDefault();
    const next = shown.at[through] - Math.sign(event.deltaY);
    shown.at[through] = Math.min(Math.max(next, 0), shown.packed.size[through] - 1);
    draw();
  }, { passive: false });
  const point = (event) => {
    if (!shown || !event.buttons && event.type !== 'pointerdown') return;
    const box = canvas.getBoundingClientRect();
    // the picture keeps its shape inside the element
    const scale = Math.min(box.width / canvas.width, box.height / canvas.height);
    const x = (event.clientX - box.left - (box.width - scale * canvas.width) / 2) / (scale * canvas.width);
    const y = (event.clientY - box.top - (box.height - scale * canvas.height) / 2) / (scale * canvas.height);
    const limit = (part, axis) => Math.min(Math.max(Math.floor(part * shown.packed.size[axis]), 0), shown.packed.size[axis] - 1);
    shown.at[right] = limit(x, right);
    shown.at[up] = limit(1 - y, up);
    draw();
  };
  canvas.addEventListener('pointerdown', point);
  canvas.addEventListener('pointermove', point);
}
