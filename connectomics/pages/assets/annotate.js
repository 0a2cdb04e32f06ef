"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const { shape, margin, voxel_size: voxel, classes, edits: logs, page } = JSON.parse($("state").textContent);
  const [depth, height, width] = shape;
  const [mz, my, mx] = margin;
  const base = location.pathname.replace(/\/?$/, "/");
  const arrays = { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array };
  const rows = height + 2 * my, columns = width + 2 * mx; // of raw
  const unit = Math.min(voxel[1], voxel[2]), tall = voxel[1] / unit, wide = voxel[2] / unit; // sides of a voxel
  const canvas = $("view"), screen = canvas.getContext("2d");
  const picture = new OffscreenCanvas(columns, rows), layer = picture.getContext("2d");

  let z = Math.min(Math.max(Number(new URLSearchParams(location.hash.slice(1)).get("z") ?? depth >> 1) || 0, 0), depth - 1);
  let active = classes[0];
  let hidden = false; // all overlays
  let scale = 1, left = 0, top = 0; // screen = left + scale * wide * (column of raw)
  let mouse = null; // last place of the pointer, in voxels of the crop
  for (const one of classes) {
    one.visible = true;
    one.id = one.next; // what the brush draws
    one.rgb = [1, 3, 5].map((k) => parseInt(one.color.slice(k, k + 2), 16));
  }
  const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;
  const choose = (name, value) => { document.querySelector(`input[name=${name}][value=${value}]`).checked = true; };
  const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
  let failed = false; // the last message is an error, and stays until the next section or stroke
  const say = (text, bad = false) => {
    failed = bad;
    $("status").textContent = text;
    $("status").classList.toggle("bad", bad);
  };

  // -- sections, from the server; the least recently used ones are dropped ------------------------------------------
  const planes = new Map(); // path -> array, or null while it is on its way
  const versions = new Map(); // path -> number of strokes
  const most = Math.max(24, Math.floor(3e8 / (rows * columns * 4)));
  const plane = (path) => planes.get(path) ?? null;
  const path_of = (kind, one, at) => `${kind}/${one.name}/${at}`;

  async function load(path, type) {
    if (planes.has(path)) {
      const found = planes.get(path);
      planes.delete(path); // to the end: it is used now
      planes.set(path, found);
      return;
    }
    planes.set(path, null);
    try {
      let version, data;
      do { // until nothing was drawn there meanwhile
        version = versions.get(path);
        if (path.startsWith("labels/")) await saved();
        const reply = await fetch(base + path);
        if (!reply.ok) throw new Error(await reply.text());
        data = await reply.arrayBuffer();
      } while (versions.get(path) !== version);
      planes.set(path, new type(data));
    } catch (error) {
      planes.delete(path);
      say(`cannot load section ${path}: ${error.message}`, true);
      return;
    }
    for (const old of planes.keys()) {
      if (planes.size <= most) break;
      if (planes.get(old) !== null) planes.delete(old);
    }
    const at = Number(path.slice(path.lastIndexOf("/") + 1));
    if (at === z) {
      show();
      ready();
    } else if (Math.abs(at - z) === 1) neighbors();
  }

  function ready() { // says whether all of the section is there
    if (!queue.length && !failed) say([...paths(z)].every(([path]) => plane(path)) ? "saved" : "loading …");
  }

  function* paths(at) { // what a section consists of
    if (at < -mz || at >= depth + mz) return;
    yield [`raw/${at}`, Uint8Array];
    if (at < 0 || at >= depth) return;
    for (const one of classes) {
      yield [path_of("labels", one, at), arrays[one.bytes]];
      if (one.predicted) yield [path_of("predicted", one, at), arrays[one.bytes]];
    }
  }

  function need(at) {
    for (const [path, type] of paths(at)) load(path, type);
  }

  function go(to) {
    if (stroke) end();
    z = Math.min(Math.max(to, -mz), depth - 1 + mz);
    $("z").value = z;
    history.replaceState(null, "", `#z=${z}`);
    show();
    failed = false;
    for (const step of [0, 1, -1, 2, -2]) need(z + step);
    ready();
  }

  // -- pictures -----------------------------------------------------------------------------------------------------
  const gray = new Uint8Array(256);
  function contrast() {
    const low = Number($("low").value), high = Math.max(Number($("high").value), low + 1);
    for (let v = 0; v < 256; v++) gray[v] = Math.min(255, Math.max(0, (255 * (v - low)) / (high - low)));
  }

  function color_of(one, value) {
    if (one.kind !== "instance") return one.rgb;
    const turn = (Number(value) * 0.61803398875) % 1, part = (k) => { // a hue for every ID
      const t = (turn * 6 + k) % 6;
      return 255 - 200 * Math.max(0, Math.min(t, 4 - t, 1));
    };
    return [part(5), part(3), part(1)];
  }

  /** Colors of a rectangle of section `at`, in voxels of raw; null if its raw is not there yet. */
  function paint(at, x0, y0, w, h) {
    const raw = plane(`raw/${at}`);
    if (raw === null || w <= 0 || h <= 0) return null;
    const image = new ImageData(w, h), out = image.data, alpha = Number($("alpha").value) / 100;
    const inside = at >= 0 && at < depth;
    const layers = [];
    for (const one of classes) {
      const labels = inside && !hidden && one.visible ? plane(path_of("labels", one, at)) : null;
      const guess = one.predicted && $("predicted").checked ? plane(path_of("predicted", one, at)) : null;
      if (labels) layers.push({ one, labels, guess });
    }
    const hatch = $("hatch").checked;
    for (let row = 0, k = 0; row < h; row++) {
      const y = y0 + row - my;
      for (let column = 0; column < w; column++, k += 4) {
        const x = x0 + column - mx, within = inside && x >= 0 && y >= 0 && x < width && y < height;
        const g = gray[raw[(y0 + row) * columns + x0 + column]] * (within ? 1 : 0.55);
        let r = g, e = g, b = g;
        if (within) {
          const j = y * width + x;
          for (const { one, labels, guess } of layers) {
            const { absent, unknown } = one;
            let value = labels[j], strength = alpha;
            if (value === unknown) {
              value = guess === null ? unknown : edited(one, guess[j]);
              if (value === unknown) {
                if (hatch && one === active && (x + y) % 8 < 2) { r += (215 - r) * 0.4; e += (215 - e) * 0.4; b += (235 - b) * 0.4; }
                continue;
              }
              strength = (x - y) & 2 ? alpha : alpha * 0.25; // predicted, not accepted: striped the other way
            }
            if (value === absent) continue;
            const [cr, cg, cb] = color_of(one, value);
            r += (cr - r) * strength; e += (cg - e) * strength; b += (cb - b) * strength;
          }
        }
        out[k] = r; out[k + 1] = e; out[k + 2] = b; out[k + 3] = 255;
      }
    }
    return image;
  }

  function refresh(x0 = 0, y0 = 0, w = columns, h = rows) { // a part of the section, in voxels of raw
    const image = paint(z, x0, y0, w, h);
    if (image) layer.putImageData(image, x0, y0);
    else if (plane(`raw/${z}`) === null) layer.clearRect(0, 0, columns, rows);
    draw();
  }

  let waiting = false;
  function draw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      screen.setTransform(1, 0, 0, 1, 0, 0);
      screen.clearRect(0, 0, canvas.width, canvas.height);
      screen.imageSmoothingEnabled = scale < 1;
      screen.setTransform(scale, 0, 0, scale, left, top);
      screen.drawImage(picture, 0, 0, wide * columns, tall * rows);
      screen.strokeStyle = "#f0e442";
      screen.lineWidth = 1 / scale;
      screen.strokeRect(wide * mx, tall * my, wide * width, tall * height);
      if (mouse && chosen("tool") === "brush") {
        screen.beginPath();
        screen.arc(wide * (mouse[0] + mx), tall * (mouse[1] + my), Number($("size").value) / 2, 0, 2 * Math.PI);
        screen.stroke();
      }
    });
  }

  function neighbors() {
    const [x, y] = mouse ?? [width / 2, height / 2];
    for (const [id, at] of [["before", z - 1], ["after", z + 1]]) {
      const target = $(id).getContext("2d"), side = $(id).width;
      const w = Math.min(Math.ceil(side / wide), columns), h = Math.min(Math.ceil(side / tall), rows);
      const x0 = Math.max(0, Math.min(Math.round(x) + mx - (w >> 1), columns - w));
      const y0 = Math.max(0, Math.min(Math.round(y) + my - (h >> 1), rows - h));
      const image = paint(at, x0, y0, w, h);
      target.clearRect(0, 0, side, side);
      if (!image) continue;
      const part = new OffscreenCanvas(w, h);
      part.getContext("2d").putImageData(image, 0, 0);
      target.imageSmoothingEnabled = false;
      target.drawImage(part, 0, 0, wide * w, tall * h);
    }
  }

  function show() {
    const inside = z >= 0 && z < depth;
    $("place").textContent = `${z} of 0–${depth - 1}${inside ? "" : " (around the crop)"}`;
    refresh();
    neighbors();
  }

  let fitted = true; // all of it is shown, also if the window changes; until somebody zooms or pans
  function fit() {
    fitted = true;
    scale = Math.min(canvas.width / (wide * columns), canvas.height / (tall * rows));
    left = (canvas.width - wide * columns * scale) / 2;
    top = (canvas.height - tall * rows * scale) / 2;
    draw();
  }

  function zoom(factor, x = canvas.width / 2, y = canvas.height / 2) {
    const next = Math.min(64, Math.max(0.05, scale * factor));
    fitted = false;
    left = x - ((x - left) * next) / scale;
    top = y - ((y - top) * next) / scale;
    scale = next;
    draw();
  }

  // -- saving: strokes go to the server one by one, and stay here until they are on disk ----------------------------
  const queue = [];
  let busy = false;
  async function saved() {
    while (queue.length) await sleep(20);
  }

  async function send() {
    if (busy) return;
    busy = true;
    while (queue.length) {
      const { one, at, x, y, w, h, values } = queue[0];
      say("saving …");
      const address = `${base}labels/${one.name}/${at}?y=${y}&x=${x}&height=${h}&width=${w}&page=${page}`;
      try {
        const reply = await fetch(address, { method: "POST", body: values });
        if (reply.ok) {
          queue.shift();
          continue;
        }
        const why = (await reply.text()) || `status ${reply.status}`;
        if (reply.status < 500) { // will not be taken: show what is on disk
          queue.shift();
          planes.delete(path_of("labels", one, at));
          need(at);
          say(`refused, not saved: ${why}`, true);
          busy = false;
          if (queue.length) send();
          return;
        }
        say(`NOT SAVED, trying again: ${why}`, true);
      } catch {
        say("NOT SAVED: the server does not answer; if it has ended, run pytc annotate again and open its new address", true);
      }
      await sleep(1500);
    }
    busy = failed = false;
    ready();
  }

  function put(one, at, x, y, w, h, values) {
    const path = path_of("labels", one, at), labels = plane(path);
    versions.set(path, (versions.get(path) ?? 0) + 1);
    if (labels) for (let row = 0; row < h; row++) labels.set(values.subarray(row * w, (row + 1) * w), (y + row) * width + x);
    queue.push({ one, at, x, y, w, h, values });
    send();
  }

  // -- undo ---------------------------------------------------------------------------------------------------------
  const done = [], undone = [];
  function cut(labels, x, y, w, h) {
    const out = new labels.constructor(w * h);
    for (let row = 0; row < h; row++) out.set(labels.subarray((y + row) * width + x, (y + row) * width + x + w), row * w);
    return out;
  }

  /** Save what changed between two versions of a section within a rectangle, and remember it. */
  function commit(one, at, before, after, [x0, y0, x1, y1]) {
    let [l, t, r, b] = [x1, y1, x0, y0];
    for (let y = y0; y < y1; y++) {
      for (let x = x0; x < x1; x++) {
        if (before[y * width + x] === after[y * width + x]) continue;
        l = Math.min(l, x); r = Math.max(r, x + 1); t = Math.min(t, y); b = Math.max(b, y + 1);
      }
    }
    if (r <= l) return;
    const part = [l, t, r - l, b - t];
    const step = { one, at, part, before: cut(before, ...part), after: cut(after, ...part) };
    done.push(step);
    if (done.length > 200) done.shift();
    undone.length = 0;
    put(one, at, ...part, step.after);
    buttons();
  }

  function back(from, to, version) {
    if (stroke) end();
    const step = from.pop();
    if (!step) return;
    to.push(step);
    put(step.one, step.at, ...step.part, step[version]);
    activate(step.one);
    go(step.at);
  }
  const undo = () => back(done, undone, "before");
  const redo = () => back(undone, done, "after");

  // -- tools --------------------------------------------------------------------------------------------------------
  let stroke = null, pan = null, space = false;

  function value() {
    const draws = chosen("draws");
    return draws === "absent" ? active.absent : draws === "unknown" ? active.unknown : active.kind === "instance" ? active.id : 1;
  }

  function stamp([xa, ya], [xb, yb]) { // discs along a line between voxels of the crop; the size is in voxels of the smaller side
    const radius = Number($("size").value) / 2, length = Math.hypot(wide * (xb - xa), tall * (yb - ya));
    const steps = Math.max(1, Math.ceil(length / Math.max(0.5, radius / 2)));
    const box = [width, height, 0, 0];
    for (let k = 0; k <= steps; k++) {
      const cx = xa + ((xb - xa) * k) / steps, cy = ya + ((yb - ya) * k) / steps;
      const x0 = Math.max(0, Math.floor(cx - radius / wide)), x1 = Math.min(width, Math.ceil(cx + radius / wide));
      const y0 = Math.max(0, Math.floor(cy - radius / tall)), y1 = Math.min(height, Math.ceil(cy + radius / tall));
      for (let y = y0; y < y1; y++) {
        for (let x = x0; x < x1; x++) {
          const under = x === Math.floor(cx) && y === Math.floor(cy); // also of a brush smaller than a voxel
          const apart = Math.hypot(wide * (x + 0.5 - cx), tall * (y + 0.5 - cy));
          if (under || apart <= Math.max(radius, 0.71)) stroke.labels[y * width + x] = stroke.value;
        }
      }
      grow(box, x0, y0, x1, y1);
    }
    if (box[2] <= box[0] || box[3] <= box[1]) return;
    grow(stroke.box, ...box);
    refresh(box[0] + mx, box[1] + my, box[2] - box[0], box[3] - box[1]);
  }

  function grow(box, x0, y0, x1, y1) {
    box[0] = Math.min(box[0], x0); box[1] = Math.min(box[1], y0); box[2] = Math.max(box[2], x1); box[3] = Math.max(box[3], y1);
  }

  function fill(labels, x, y, to) { // all connected voxels with the value of the clicked one
    const from = labels[y * width + x], box = [width, height, 0, 0];
    if (from === to) return box;
    const open = [y * width + x];
    labels[open[0]] = to;
    while (open.length) {
      const j = open.pop(), column = j % width;
      grow(box, column, (j - column) / width, column + 1, (j - column) / width + 1);
      for (const next of [column ? j - 1 : -1, column < width - 1 ? j + 1 : -1, j - width, j + width]) {
        if (next >= 0 && next < labels.length && labels[next] === from) {
          labels[next] = to;
          open.push(next);
        }
      }
    }
    return box;
  }

  function begin(at) {
    const labels = plane(path_of("labels", active, z)), tool = chosen("tool");
    if (z < 0 || z >= depth || labels === null) return;
    const [x, y] = [Math.floor(at[0]), Math.floor(at[1])], inside = x >= 0 && y >= 0 && x < width && y < height;
    if (tool === "pick") {
      const guess = active.predicted ? plane(path_of("predicted", active, z)) : null;
      if (!inside) return;
      const found = labels[y * width + x] === active.unknown && guess ? edited(active, guess[y * width + x]) : labels[y * width + x];
      if (found === active.absent || found === active.unknown) return;
      active.id = found;
      choose("tool", "brush");
      buttons();
      return;
    }
    if (["merge", "split", "delete"].includes(tool)) {
      if (inside) edit(tool, x, y);
      return;
    }
    if (chosen("draws") === "unknown" && active.unknown === null) {
      say(`${active.name} has no value for unknown`, true);
      return;
    }
    if (value() >= 2 ** (8 * active.bytes)) {
      say(`no ID is left in ${8 * active.bytes} bits: run pytc annotate again, which stores ${active.name} in 32 bits`, true);
      return;
    }
    const before = labels.slice();
    if (tool === "fill") {
      if (!inside) return;
      const box = fill(labels, x, y, value());
      commit(active, z, before, labels, box);
      refresh();
      return;
    }
    stroke = { one: active, at: z, before, labels, value: value(), box: [width, height, 0, 0] };
    stamp(at, at);
  }

  function end() {
    const { one, at, before, labels, box } = stroke;
    stroke = null;
    commit(one, at, before, labels, box);
  }

  /** Make the unknown voxels of the section known: as predicted; absent if the class has no prediction at all. */
  function accept() {
    const labels = plane(path_of("labels", active, z)), guess = active.predicted ? plane(path_of("predicted", active, z)) : null;
    if (stroke || labels === null || active.unknown === null || (active.predicted && guess === null)) return;
    const before = labels.slice();
    for (let j = 0; j < labels.length; j++) if (labels[j] === active.unknown) labels[j] = guess ? edited(active, guess[j]) : active.absent;
    commit(active, z, before, labels, [0, 0, width, height]);
    refresh();
  }

  function fresh() { // an ID that no object has
    active.next += Number(active.next === active.unknown);
    active.id = active.next++;
    buttons();
  }

  // -- edits of predicted instances: the server logs them, and the page shows what is merged or deleted ---------------
  let first = null; // what the first of two clicks chose
  const edited = (one, value) => one.table?.get(value) ?? value;

  function replay(lines) {
    for (const one of classes) [one.table, one.split] = [new Map(), new Set()];
    for (const { op, class: name, ids } of lines) {
      const one = classes.find((c) => c.name === name);
      if (op === "split") {
        one.split.add(ids[0]);
        continue;
      }
      const to = op === "merge" ? ids[0] : one.absent, gone = new Set(op === "merge" ? ids.slice(1) : ids);
      for (const [from, now] of one.table) if (gone.has(now)) one.table.set(from, to);
      for (const id of gone) one.table.set(id, to);
    }
    $("logged").textContent = `${lines.length} here`;
    $("unedit").disabled = !lines.length;
    show();
  }

  async function log(address, body) {
    try {
      const reply = await fetch(base + address, body === undefined ? {} : { method: "POST", body });
      if (!reply.ok) throw new Error((await reply.text()) || `status ${reply.status}`);
      failed = false;
      replay(await reply.json());
      ready();
    } catch (error) {
      say(`the edit is not logged: ${error.message}`, true);
    }
  }

  function edit(tool, x, y) {
    const one = active, labels = plane(path_of("labels", one, z)), guess = one.predicted ? plane(path_of("predicted", one, z)) : null;
    const there = guess && labels[y * width + x] === one.unknown ? edited(one, guess[y * width + x]) : one.absent;
    if (one.kind !== "instance" || there === one.absent || there === one.unknown) {
      say("no predicted instance here", true);
      return;
    }
    if (one.split.has(there)) {
      say(`${there} is split; apply the edits, then go on with the result`, true);
      return;
    }
    if (tool === "delete") {
      log(`edits?page=${page}`, JSON.stringify({ op: tool, class: one.name, ids: [there] }));
      return;
    }
    if (first === null || first.tool !== tool || first.one !== one) {
      first = { tool, one, id: there, seed: [z, y, x] };
      say(tool === "merge" ? `${there}: click what belongs to it` : `${there}: click the other part`);
      failed = true; // the message stays
      return;
    }
    const { id, seed } = first;
    if ((tool === "merge") === (id === there)) {
      say(tool === "merge" ? `${there} is the same instance` : `that is ${there}, not ${id}`, true);
      return;
    }
    first = null;
    const whole = { op: tool, class: one.name, ids: tool === "merge" ? [id, there] : [id] };
    log(`edits?page=${page}`, JSON.stringify(tool === "merge" ? whole : { ...whole, seeds: [seed, [z, y, x]] }));
  }

  // -- the panel ----------------------------------------------------------------------------------------------------
  function buttons() {
    const ids = active.kind === "instance";
    for (const id of ["ids", "pick"]) $(id).hidden = !ids;
    $("ghost").hidden = !active.predicted;
    $("number").value = active.id;
    $("drawn").textContent = ids ? `${active.name}, ID ${active.id}` : active.name;
    $("accept").innerHTML = active.predicted ? "accept prediction <kbd>A</kbd>" : "unknown is absent <kbd>A</kbd>";
    $("accept").disabled = active.unknown === null;
    $("undo").disabled = !done.length;
    $("redo").disabled = !undone.length;
    $("width").textContent = $("size").value;
    [...$("classes").children].forEach((row, k) => {
      row.classList.toggle("active", classes[k] === active);
      row.querySelector("input").checked = classes[k].visible;
    });
  }

  function activate(one) {
    if (stroke) end();
    active = one;
    if (!(chosen("tool") !== "pick" || one.kind === "instance")) choose("tool", "brush");
    buttons();
    show();
  }

  classes.forEach((one, k) => {
    const row = document.createElement("div"), mark = document.createElement("i"), name = document.createElement("span");
    const seen = document.createElement("input"), key = document.createElement("kbd");
    seen.type = "checkbox";
    seen.title = "show";
    mark.style.background = one.color;
    name.textContent = one.name;
    key.textContent = k + 1;
    row.append(seen, mark, name, ...(k < 9 ? [key] : []));
    row.addEventListener("click", (event) => { if (event.target !== seen) activate(one); });
    seen.addEventListener("change", () => { one.visible = seen.checked; show(); });
    $("classes").append(row);
  });
  $("z").min = -mz;
  $("z").max = depth - 1 + mz;
  $("z").addEventListener("input", () => go(Number($("z").value)));
  $("number").addEventListener("change", () => {
    const given = Math.round(Number($("number").value));
    if (given > 0 && given !== active.unknown && given < 2 ** (8 * active.bytes)) active.id = given;
    active.next = Math.max(active.next, active.id + 1);
    buttons();
  });
  for (const id of ["low", "high", "alpha", "hatch", "predicted"]) $(id).addEventListener("input", () => { contrast(); show(); });
  $("size").addEventListener("input", () => { buttons(); draw(); });
  $("new").addEventListener("click", fresh);
  $("accept").addEventListener("click", accept);
  $("undo").addEventListener("click", undo);
  $("redo").addEventListener("click", redo);
  document.querySelector("aside").addEventListener("change", (event) => { // keys go to the page again
    if (event.target.type !== "number") event.target.blur();
  });

  const resize = (by) => { $("size").value = Number($("size").value) + by; buttons(); draw(); };
  const keys = {
    b: () => choose("tool", "brush"), f: () => choose("tool", "fill"),
    i: () => { if (active.kind === "instance") choose("tool", "pick"); },
    d: () => choose("draws", "class"), e: () => choose("draws", "absent"),
    u: () => choose("draws", chosen("draws") === "unknown" ? "class" : "unknown"),
    n: () => { if (active.kind === "instance") fresh(); }, a: accept, z: undo, y: redo, "[": () => resize(-2), "]": () => resize(2),
    ",": () => go(z - 1), ".": () => go(z + 1), ArrowUp: () => go(z - 1), ArrowDown: () => go(z + 1),
    "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), 0: fit,
    v: () => { active.visible = !active.visible; buttons(); show(); }, h: () => { hidden = !hidden; show(); },
    ...(logs ? Object.fromEntries([["g", "merge"], ["s", "split"], ["x", "delete"]].map(([key, tool]) => [key, () => {
      first = null;
      choose("tool", tool);
    }])) : {}),
    ...(logs ? { w: () => $("unedit").click(), Escape: () => { first = null; failed = false; ready(); } } : {}),
    m: () => $("hatch").click(), p: () => $("predicted").click(),
  };
  addEventListener("keydown", (event) => {
    if (event.target.type === "number" || event.altKey || event.metaKey) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (event.ctrlKey && !"zy".includes(key)) return;
    if (key === " ") space = true;
    else if (key === "z" && event.shiftKey) redo();
    else if (keys[key]) keys[key]();
    else if (key >= "1" && key <= "9" && classes[key - 1]) activate(classes[key - 1]);
    else return;
    event.preventDefault();
    draw();
  });
  addEventListener("keyup", (event) => { if (event.key === " ") space = false; });
  addEventListener("beforeunload", (event) => { if (queue.length) event.preventDefault(); });

  // -- the pointer --------------------------------------------------------------------------------------------------
  const pixel = (event) => [event.offsetX * devicePixelRatio, event.offsetY * devicePixelRatio];
  const voxel_at = ([x, y]) => [(x - left) / (scale * wide) - mx, (y - top) / (scale * tall) - my];
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    if (event.button === 1 || event.button === 2 || space) pan = pixel(event);
    else if (event.button === 0) begin((mouse = voxel_at(pixel(event))));
    event.preventDefault();
    document.activeElement?.blur();
  });
  canvas.addEventListener("pointermove", (event) => {
    const at = pixel(event), last = mouse;
    if (pan) {
      left += at[0] - pan[0];
      top += at[1] - pan[1];
      fitted = false;
      pan = at;
    }
    mouse = voxel_at(at);
    if (stroke && last) stamp(last, mouse);
    if (!stroke && !pan) neighbors();
    draw();
  });
  for (const kind of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(kind, () => {
      if (stroke) end();
      pan = null;
    });
  }
  canvas.addEventListener("pointerleave", () => { if (!stroke) { mouse = null; draw(); } });
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  let turned = 0;
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    if (event.ctrlKey) {
      zoom(Math.exp(-event.deltaY / 300), ...pixel(event));
      return;
    }
    turned += event.deltaMode ? event.deltaY * 40 : event.deltaY;
    const step = Math.trunc(turned / 40);
    if (!step) return;
    turned = 0;
    go(z + Math.sign(step));
  }, { passive: false });

  new ResizeObserver(() => {
    canvas.width = canvas.clientWidth * devicePixelRatio;
    canvas.height = canvas.clientHeight * devicePixelRatio;
    if (fitted) fit();
    else draw();
  }).observe(canvas);
  $("place").title = `voxels of ${voxel.join(" × ")} nm (z, y, x)`;
  contrast();
  buttons();
  $("edits").hidden = !logs;
  $("unedit").addEventListener("click", () => log(`edits?undo=1&page=${page}`, ""));
  if (logs) log("edits");
  go(z);
})();
