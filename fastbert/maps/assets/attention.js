"use strict";

// keys and values: of each layer, head and query its strongest keys, and their probabilities as parts of 65,535.
const data = JSON.parse(document.getElementById("data").textContent);
const { tokens, layers, heads, kept } = data;
const length = tokens.length;
const [keys, values] = ["keys", "values"].map(
  (name) => new Uint16Array(Uint8Array.from(atob(data[name]), (c) => c.charCodeAt(0)).buffer),
);
const MEAN = heads.length; // the choice after the last head
const LEAST = 0.02; // weaker lines are drawn only for the token that is pointed at
const THUMBNAIL = 48; // pixels at most
const ROW = 19, TOP = 26, LEFT = 260, RIGHT = 590, WIDTH = 870;

/** Probabilities (query, key) of a layer and a head, by their places in the lists; or the mean of its heads. */
function probabilities(layer, head) {
  const chosen = head === MEAN ? [...heads.keys()] : [head];
  const found = new Float32Array(length * length);
  for (const each of chosen) {
    const start = (layer * heads.length + each) * length * kept;
    for (let i = 0; i < length * kept; i++) {
      found[Math.floor(i / kept) * length + keys[start + i]] += values[start + i] / 65535 / chosen.length;
    }
  }
  return found;
}

function make(parent, name, attributes = {}, text = "") {
  const space = parent instanceof SVGElement ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const element = document.createElementNS(space, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return parent.appendChild(element);
}

/** A small picture of a head: each pixel is the highest probability of what it stands for. */
function drawThumbnail(canvas, layer, head) {
  const side = Math.min(length, THUMBNAIL);
  const highest = new Float32Array(side * side);
  const start = (layer * heads.length + head) * length * kept;
  for (let i = 0; i < length * kept; i++) {
    const query = Math.floor((Math.floor(i / kept) * side) / length);
    const place = query * side + Math.floor((keys[start + i] * side) / length);
    highest[place] = Math.max(highest[place], values[start + i] / 65535);
  }
  canvas.width = canvas.height = side;
  const image = new ImageData(side, side);
  highest.forEach((value, i) => image.data.set([26, 111, 176, 255 * Math.sqrt(value)], 4 * i));
  canvas.getContext("2d").putImageData(image, 0, 0);
}

const chosen = { layer: 0, head: 0 };
const buttons = [];
const selects = { layer: document.getElementById("layer"), head: document.getElementById("head") };
layers.forEach((layer, i) => make(selects.layer, "option", { value: i }, layer));
heads.forEach((head, i) => make(selects.head, "option", { value: i }, head));
make(selects.head, "option", { value: MEAN }, "mean of all");
for (const [name, select] of Object.entries(selects)) {
  select.addEventListener("change", () => choose({ [name]: Number(select.value) }));
}

const table = make(document.getElementById("overview"), "table");
const heading = make(table, "tr");
make(heading, "th");
heads.forEach((head) => make(heading, "th", { scope: "col" }, `head ${head}`));
layers.forEach((layer, i) => {
  const row = make(table, "tr");
  make(row, "th", { scope: "row" }, `layer ${layer}`);
  heads.forEach((head, j) => {
    const button = make(make(row, "td"), "button", { "aria-label": `layer ${layer}, head ${head}` });
    button.addEventListener("click", () => choose({ layer: i, head: j }));
    drawThumbnail(make(button, "canvas"), i, j);
    buttons.push({ button, layer: i, head: j });
  });
});

const svg = document.getElementById("lines");
svg.setAttribute("width", WIDTH);
svg.setAttribute("height", TOP + length * ROW + 8);
const marks = make(svg, "g");
const lines = make(svg, "g");
make(svg, "text", { class: "side", x: LEFT, y: 14, "text-anchor": "end" }, "query: looks");
make(svg, "text", { class: "side", x: RIGHT, y: 14 }, "key: is looked at");
const middle = (i) => TOP + i * ROW + ROW / 2;
let pinned = null;
tokens.forEach((token, i) => {
  const short = token.length > 26 ? `${token.slice(0, 25)}…` : token;
  for (const side of ["query", "key"]) {
    const isQuery = side === "query";
    const place = isQuery ? { x: LEFT, "text-anchor": "end" } : { x: RIGHT };
    make(svg, "text", { ...place, y: middle(i) + 4 }, short);
    const row = make(svg, "rect", {
      class: "row", x: isQuery ? 0 : RIGHT - 4, y: TOP + i * ROW, width: isQuery ? LEFT + 4 : WIDTH - RIGHT, height: ROW,
    });
    make(row, "title", {}, token);
    row.addEventListener("pointerenter", () => draw(pinned ?? { side, i }));
    row.addEventListener("pointerleave", () => draw(pinned));
    row.addEventListener("click", () => {
      pinned = pinned?.side === side && pinned.i === i ? null : { side, i };
      draw(pinned ?? { side, i });
    });
  }
});

let current;

/** All lines, or those of the query or the key `only`, with their numbers. */
function draw(only) {
  lines.replaceChildren();
  marks.replaceChildren();
  for (let query = 0; query < length; query++) {
    for (let key = 0; key < length; key++) {
      const value = current[query * length + key];
      if (only ? (only.side === "query" ? query : key) !== only.i || value < 0.0005 : value < LEAST) continue;
      const ends = { x1: LEFT + 6, y1: middle(query), x2: RIGHT - 6, y2: middle(key) };
      make(lines, "line", { ...ends, "stroke-opacity": Math.max(value, 0.03).toFixed(3) });
      if (!only) continue;
      const [x, y] = only.side === "query" ? [RIGHT - 4, key] : [LEFT - 216, query];
      const box = { class: "mark", x, y: TOP + y * ROW + 1, width: 220, height: ROW - 2 };
      make(marks, "rect", { ...box, "fill-opacity": (0.6 * value).toFixed(3) });
      const at = only.side === "query" ? { x: RIGHT + 222 } : { x: 2 };
      make(marks, "text", { class: "number", ...at, y: middle(y) + 4 }, value.toFixed(3));
    }
  }
}

function choose(change) {
  Object.assign(chosen, change);
  selects.layer.value = chosen.layer;
  selects.head.value = chosen.head;
  for (const { button, layer, head } of buttons) {
    button.setAttribute("aria-pressed", layer === chosen.layer && head === chosen.head);
  }
  current = probabilities(chosen.layer, chosen.head);
  draw(pinned);
}

document.getElementById("least").textContent = `Lines below ${LEAST} are drawn only for the token that you point at.`;
choose({});
