// Curves, average certified radii and training, with their options.
parts.push((data, fit) => {
  const { shape, trace, tenths, ticks, tickText, board, axes, algorithm, each } = drawing;
  const state = {
    unit: 0, shares: false, band: document.getElementById("show-band")?.defaultChecked, lines: false, radius: Math.floor(data.radii.length / 4),
    algorithms: data.runs.map(() => true),
    clients: new Set(data.clients),
  };

  const shareText = (value) => state.shares ? (Math.floor(1000 * value + 0.5 + 1e-9) / 1000).toFixed(3) : tenths(value);
  const withSign = (text) => state.shares ? text : `${text} %`;

  function series(root, run, xs, mean, low, high, band) {
    const layer = shape(root, "g", { class: `series s${run.slot}`, "data-run": data.runs.indexOf(run) });
    if (band) {
      const back = [...xs].reverse(), under = [...low].reverse();
      shape(layer, "path", { class: "band", d: `${trace(xs, high)}${trace(back, under).replace("M", "L")}Z` });
    }
    const line = shape(layer, "path", { class: "mean", d: trace(xs, mean) });
    if (run.dash) line.setAttribute("stroke-dasharray", run.dash);
    const every = Math.max(1, Math.floor(xs.length / 8)), first = Math.floor(run.slot * every / 4) % every;
    for (let i = first; i < xs.length; i += every) marker(layer, run, xs[i], mean[i]);
    return layer;
  }
  const marker = (parent, run, x, y) =>
    shape(parent, "path", { class: "marker", d: run.marker, transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})` });

  // Certified accuracy ------------------------------------------------------------------------
  const curveChart = document.getElementById("curve-chart");
  const slider = document.getElementById("radius");
  const readout = document.getElementById("readout");
  let scales = null, cursor = null;

  function chosen(run) {
    return run.curves.filter((_, i) => state.clients.has(run.clients[i]));
  }
  function summary(curves, at) {
    let sum = 0, low = 1, high = 0;
    for (const curve of curves) {
      sum += curve[at]; low = Math.min(low, curve[at]); high = Math.max(high, curve[at]);
    }
    return { mean: sum / curves.length, low, high };
  }

  function drawCurves() {
    const unit = data.units[state.unit], width = curveChart.clientWidth;
    const height = Math.round(Math.min(440, Math.max(280, width * 0.62)));
    const b = board(curveChart, height, { left: 48, right: 14, top: 10, bottom: 42 });
    const end = data.radii[data.radii.length - 1], shown = ticks(0, end * unit.factor, width < 480 ? 4 : 8);
    scales = axes(b, [0, end], [0, 1], shown.map((t) => t / unit.factor), [0, 0.2, 0.4, 0.6, 0.8, 1],
      `radius${unit.axis}`, (t) => tickText(t * unit.factor), (t) => state.shares ? t.toFixed(1) : `${Math.round(100 * t)} %`);
    const xs = data.radii.map(scales.x);
    data.runs.forEach((run, index) => {
      const curves = chosen(run);
      if (!state.algorithms[index] || !curves.length) return;
      const points = data.radii.map((_, i) => summary(curves, i));
      const of = (key) => points.map((p) => scales.y(p[key]));
      const layer = series(b.root, run, xs, of("mean"), of("low"), of("high"), state.band);
      if (!state.lines) return;
      for (const curve of curves) {
        const line = shape(layer, "path", { class: "client", d: trace(xs, curve.map(scales.y)) });
        if (run.dash) line.setAttribute("stroke-dasharray", run.dash);
      }
    });
    cursor = shape(b.root, "line", { class: "cursor", y1: b.top, y2: b.bottom });
    scales.root = b.root;
    moveCursor();
  }

  function moveCursor() {
    const x = scales.x(data.radii[state.radius]), text = data.units[state.unit].texts[state.radius];
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    slider.value = String(state.radius);
    slider.setAttribute("aria-valuetext", text);
    document.getElementById("radius-text").textContent = text;
    const rows = data.runs.map((run, index) => {
      const curves = chosen(run);
      return state.algorithms[index] && curves.length ? readoutRow(run, index, summary(curves, state.radius), curves.length) : null;
    }).filter(Boolean);
    if (!rows.length) {
      const empty = document.createElement("p");
      empty.textContent = "Choose at least one algorithm and one client.";
      rows.push(empty);
    }
    readout.replaceChildren(...rows);
  }

  function readoutRow(run, index, values, clients) {
    const row = document.createElement("div"), mean = document.createElement("b"), range = document.createElement("small");
    row.append(algorithm(index), mean);
    mean.textContent = withSign(shareText(values.mean));
    if (clients > 1) {
      range.textContent = `${shareText(values.low)} to ${shareText(values.high)}`;
      row.append(range);
    }
    return row;
  }

  function follow(event) {
    const svg = curveChart.querySelector("svg"), box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) * (svg.viewBox.baseVal.width / box.width);
    let best = 0;
    data.radii.forEach((radius, i) => {
      if (Math.abs(scales.x(radius) - at) < Math.abs(scales.x(data.radii[best]) - at)) best = i;
    });
    if (best !== state.radius) { state.radius = best; moveCursor(); }
  }

  // Average certified radius ------------------------------------------------------------------
  const acrChart = document.getElementById("acr-chart");
  function drawAcr() {
    const unit = data.units[state.unit], rowHeight = 58;
    const b = board(acrChart, data.runs.length * rowHeight + 44, { left: 6, right: 14, top: 0, bottom: 40 });
    const largest = Math.max(...data.runs.flatMap((run) => [...run.acr, run.mean, run.interval ? run.interval[1] : 0]));
    const end = largest > 0 ? largest * 1.04 : data.radii[data.radii.length - 1];
    const shown = ticks(0, end * unit.factor, b.width < 480 ? 4 : 8);
    const { x } = axes(b, [0, end], [0, 1], shown.map((t) => t / unit.factor), [],
      `average certified radius${unit.axis}`, (t) => tickText(t * unit.factor), String);
    data.runs.forEach((run, index) => {
      const layer = shape(b.root, "g", { class: `s${run.slot}` }), y = index * rowHeight + 38;
      const longest = Math.floor(b.width / 9) - 14, name = run.label;
      const short = name.length > longest ? `${name.slice(0, longest - 1)}…` : name;
      shape(layer, "text", { class: "name", x: b.left, y: y - 22 }, `${short}: ${run.meanTexts[state.unit]}`);
      shape(layer, "line", { class: "rail", x1: b.left, x2: b.right, y1: y, y2: y });
      run.acr.forEach((radius, i) => {
        const dot = marker(layer, run, x(radius), y + ((i * 0.618) % 1 - 0.5) * 16);
        shape(dot, "title", {}, `client ${run.clients[i]}: ${run.acrTexts[state.unit][i]}`);
      });
      if (run.interval) shape(layer, "line", { class: "range", x1: x(run.interval[0]), x2: x(run.interval[1]), y1: y, y2: y });
      shape(layer, "line", { class: "bar", x1: x(run.mean), x2: x(run.mean), y1: y - 13, y2: y + 13 });
    });
  }

  // Training ----------------------------------------------------------------------------------
  function drawHistory(container) {
    const measure = data.history[Number(container.dataset.measure)];
    const b = board(container, 250, { left: 48, right: 14, top: 8, bottom: 42 });
    const rounds = measure.series.flatMap((s) => s.rounds);
    const low = Math.min(...measure.series.flatMap((s) => s.low)), high = Math.max(...measure.series.flatMap((s) => s.high));
    const yTicks = ticks(Math.min(0, low), high, 5);
    const top = Math.max(high, yTicks[yTicks.length - 1]) || 1;
    const from = Math.min(...rounds), to = Math.max(...rounds);
    const whole = ticks(from, to, 6).filter(Number.isInteger);
    const { x, y } = axes(b, [from, to], [Math.min(0, low), top], whole, yTicks, "round", tickText, tickText);
    for (const s of measure.series) {
      const of = (key) => s[key].map(y);
      series(b.root, data.runs[s.run], s.rounds.map(x), of("mean"), of("low"), of("high"), true);
    }
    container.setAttribute("aria-label", `${measure.name} per round, one line per algorithm`);
  }

  // Controls ----------------------------------------------------------------------------------
  const drawRadii = () => { drawCurves(); drawAcr(); };
  function drawAll() {
    drawRadii();
    each("[data-measure]", drawHistory);
  }
  function showClients() {
    each("[data-client]", (box) => { box.checked = state.clients.has(Number(box.dataset.client)); });
    drawCurves();
  }

  each(".js-only", (part) => { part.hidden = false; });
  slider.max = String(data.radii.length - 1);
  slider.addEventListener("input", () => { state.radius = Number(slider.value); moveCursor(); });
  curveChart.addEventListener("pointermove", follow);
  curveChart.addEventListener("pointerdown", follow);
  each("[data-algorithm]", (box) => box.addEventListener("change", () => {
    state.algorithms[Number(box.dataset.algorithm)] = box.checked;
    drawCurves();
  }));
  each("[data-client]", (box) => box.addEventListener("change", () => {
    state.clients[box.checked ? "add" : "delete"](Number(box.dataset.client));
    drawCurves();
  }));
  each("#clients-all", (button) => button.addEventListener("click", () => { state.clients = new Set(data.clients); showClients(); }));
  each("#clients-none", (button) => button.addEventListener("click", () => { state.clients = new Set(); showClients(); }));
  each("[data-unit]", (radio) => radio.addEventListener("change", () => { state.unit = Number(radio.dataset.unit); drawRadii(); }));
  each("[data-accuracy]", (radio) => radio.addEventListener("change", () => { state.shares = radio.dataset.accuracy === "1"; drawCurves(); }));
  each("#show-band", (box) => box.addEventListener("change", () => { state.band = box.checked; drawCurves(); }));
  each("#show-clients", (box) => box.addEventListener("change", () => { state.lines = box.checked; drawCurves(); }));
  fit(drawAll);
  // A browser may restore the boxes of an earlier visit; the page starts with the defaults.
  each("input", (box) => { if (box.type === "checkbox" || box.type === "radio") box.checked = box.defaultChecked; });
  drawAll();
});
