// Everything that comes from the network's classes is set as textContent: no name can become markup.
const make = (kind, className, parent, text) => {
  const node = document.createElement(kind);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
};
const find = (name) => element.querySelector(name);
const metres = (value) => (value === null || value === undefined ? "" : value.toFixed(value < 10 ? 2 : 1) + " m");

const describe = (box) =>
  [box.name, box.score.toFixed(2), box.distance_m === undefined ? "" : metres(box.distance_m) +
    " ± " + metres(box.distance_spread_m)].filter((part) => part).join(" · ");

const lookUp = (map, x, y) => map[Math.min(map.length - 1, Math.floor(y * map.length))][
  Math.min(map[0].length - 1, Math.floor(x * map[0].length))];

const boxesAt = (data, x, y) => {
  const area = ({ xyxy: [x1, y1, x2, y2] }) => (x2 - x1) * (y2 - y1);
  return (data.boxes ?? [])
    .filter(({ xyxy: [x1, y1, x2, y2] }) => x >= x1 && x <= x2 && y >= y1 && y <= y2)
    .sort((one, other) => area(one) - area(other));
};

const mark = (boxes, point) => {
  for (const over of element.querySelectorAll(".vm-over")) {
    over.replaceChildren();
    for (const { xyxy: [x1, y1, x2, y2] } of boxes) {
      const box = make("div", "vm-box", over);
      box.style.left = 100 * x1 + "%";
      box.style.top = 100 * y1 + "%";
      box.style.width = 100 * (x2 - x1) + "%";
      box.style.height = 100 * (y2 - y1) + "%";
    }
    if (point) {
      const dot = make("div", "vm-dot", over);
      dot.style.left = 100 * point[0] + "%";
      dot.style.top = 100 * point[1] + "%";
    }
  }
};

const hideTip = () => {
  find(".vm-tip").hidden = true;
  mark([]);
};

const showTip = (event, lines) => {
  const tip = find(".vm-tip");
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  const left = Math.min(event.clientX + 16, window.innerWidth - tip.offsetWidth - 8);
  const top = event.clientY + 18 + tip.offsetHeight > window.innerHeight
    ? event.clientY - tip.offsetHeight - 12 : event.clientY + 18;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = Math.max(8, top) + "px";
};

const point = (event, data, over) => {
  const place = over.getBoundingClientRect();
  const x = (event.clientX - place.left) / place.width;
  const y = (event.clientY - place.top) / place.height;
  if (x < 0 || x >= 1 || y < 0 || y >= 1) return hideTip();
  const inside = boxesAt(data, x, y);
  const lines = inside.slice(0, 3).map(describe);
  const here = [];
  if (data.class_map) here.push(data.classes[lookUp(data.class_map, x, y)] ?? "not labelled");
  if (data.depth_map) here.push(metres(lookUp(data.depth_map, x, y)));
  if (here.length) lines.push("here: " + here.join(" · "));
  if (!lines.length) lines.push("no box here");
  mark(inside.slice(0, 1), [x, y]);
  showTip(event, lines);
};

const panel = (data, { title, url, share }) => {
  const figure = make("figure", "vm-panel", find(".vm-panels"));
  make("figcaption", "", figure, title);
  const stage = make("div", "vm-stage", figure);
  const image = make("img", "", stage);
  image.src = url;
  image.alt = title;
  const over = make("div", "vm-over", stage); // the part that shows the image; a legend or white may lie beside it
  over.style.height = 100 * share[0] + "%";
  over.style.width = 100 * share[1] + "%";
  for (const name of ["pointermove", "pointerdown"]) stage.addEventListener(name, (event) => point(event, data, over));
  stage.addEventListener("pointerleave", hideTip);
};

const listBoxes = (data) => {
  if (!data.boxes.length) return make("p", "", find(".vm-boxes"), "No box has this score; a lower threshold shows more.");
  const table = make("table", "", find(".vm-boxes"));
  const near = (box) => box.distance_m ?? Infinity;
  const boxes = [...data.boxes].sort((one, other) => near(one) - near(other) || other.score - one.score);
  const withMetres = boxes.some((box) => box.distance_m !== undefined);
  make("caption", "", table, boxes.length + (boxes.length === 1 ? " box" : " boxes") + (withMetres ? ", nearest first" : ""));
  const head = make("tr", "", make("thead", "", table));
  for (const name of ["class", "score", ...(withMetres ? ["distance", "spread"] : [])]) make("th", "", head, name);
  const body = make("tbody", "", table);
  for (const box of boxes) {
    const row = make("tr", "", body);
    row.tabIndex = 0;
    const spread = withMetres ? [metres(box.distance_m), metres(box.distance_spread_m)] : [];
    for (const text of [box.name, box.score.toFixed(2), ...spread]) make("td", "", row, text);
    for (const name of ["pointerenter", "focus"]) row.addEventListener(name, () => mark([box]));
    for (const name of ["pointerleave", "blur"]) row.addEventListener(name, () => mark([]));
  }
};

const render = () => {
  for (const name of [".vm-panels", ".vm-boxes"]) find(name).replaceChildren();
  find(".vm-tip").hidden = true;
  find(".vm-empty").hidden = Boolean(props.value);
  if (!props.value) return;
  const data = JSON.parse(props.value);
  for (const one of data.panels) panel(data, one);
  if (data.boxes) listBoxes(data);
};

watch("value", render);
render();
