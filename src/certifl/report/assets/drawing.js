"use strict";
const report = JSON.parse(document.getElementById("report-data").textContent);
// Each is called once for every panel, with its numbers and a way to be redrawn at another width.
const parts = [];

// Shapes and axes that all charts of the page are made of.
const drawing = (() => {
  const NAMESPACE = "http://www.w3.org/2000/svg";
  const shape = (parent, name, attributes, text) => {
    const made = document.createElementNS(NAMESPACE, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return parent.appendChild(made);
  };
  const trace = (xs, ys) => xs.map((x, i) => `${i ? "L" : "M"}${x.toFixed(1)} ${ys[i].toFixed(1)}`).join("");
  const tenths = (value) => (Math.floor(1000 * value + 0.5 + 1e-9) / 10).toFixed(1);

  function ticks(low, high, most) {
    const raw = (high - low) / most;
    if (!(raw > 0)) return [low];
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((s) => s >= raw * 0.999);
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-6; k++) found.push(k * step);
    return found;
  }
  const tickText = (value) => String(Number(value.toPrecision(6)));

  function board(container, height, margin) {
    const width = Math.max(240, Math.floor(container.clientWidth));
    container.replaceChildren();
    const root = shape(container, "svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    return { root, width, height, left: margin.left, right: width - margin.right, top: margin.top, bottom: height - margin.bottom };
  }

  function axes(b, xRange, yRange, xTicks, yTicks, xLabel, xText, yText) {
    const x = (v) => b.left + (v - xRange[0]) / (xRange[1] - xRange[0] || 1) * (b.right - b.left);
    const y = (v) => b.bottom - (v - yRange[0]) / (yRange[1] - yRange[0] || 1) * (b.bottom - b.top);
    for (const t of yTicks) {
      shape(b.root, "line", { class: "grid", x1: b.left, x2: b.right, y1: y(t), y2: y(t) });
      shape(b.root, "text", { x: b.left - 8, y: y(t) + 4, "text-anchor": "end" }, yText(t));
    }
    for (const t of xTicks) {
      shape(b.root, "line", { class: "axis", x1: x(t), x2: x(t), y1: b.bottom, y2: b.bottom + 4 });
      shape(b.root, "text", { x: x(t), y: b.bottom + 18, "text-anchor": "middle" }, xText(t));
    }
    shape(b.root, "line", { class: "axis", x1: b.left, x2: b.right, y1: b.bottom, y2: b.bottom });
    shape(b.root, "text", { x: (b.left + b.right) / 2, y: b.height - 3, "text-anchor": "middle" }, xLabel);
    return { x, y };
  }
  // An algorithm's swatch and name, as the page shows them in its controls.
  const algorithm = (index) => document.querySelector(`[data-algorithm="${index}"] ~ .algorithm`).cloneNode(true);
  const each = (selector, act) => document.querySelectorAll(selector).forEach(act);
  const put = (parent, name, text, kind) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return parent.appendChild(made);
  };
  return { shape, trace, tenths, ticks, tickText, board, axes, algorithm, each, put };
})();
