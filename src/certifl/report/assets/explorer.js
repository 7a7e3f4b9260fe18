// The image explorer: a picture on its way through the deformations, and what is voted on it.
parts.push((data, fit) => {
  const { shape, each, put } = drawing;
  const explorer = data.explorer;
  if (!explorer) return;
  // `walk` is one past the walks where the image is shifted in both directions: then `step` is a point.
  const picked = { image: 0, walk: 0, step: 0 };
  const slider = document.getElementById("step"), canvas = document.getElementById("picture"), pad = document.getElementById("pad");
  const spots = [];
  const thumb = 10;  // half a thumb in pixels: the strips begin and end where its centre does

  const named = (label) => explorer.names && explorer.names[label] !== undefined ? explorer.names[label] : String(label);
  const titled = (label) => explorer.names && explorer.names[label] === String(label) || !explorer.names ? `class ${label}` : named(label);
  const now = () => explorer.images[picked.image];
  const both = () => picked.walk === explorer.walks.length;
  const way = () => both() ? now().plane : now().walks[picked.walk];
  const seen = (run) => both() ? run.plane : run.walks[picked.walk];
  const side = () => now().plane.values.length;
  const centre = () => both() ? (side() ** 2 - 1) / 2 : way().values.indexOf(0);
  // Column and row of a point; the picture moves against the sign of what is read, see the walks' words.
  const column = (point) => side() - 1 - point % side(), row = (point) => side() - 1 - Math.floor(point / side());
  const pointAt = (x, y) => (side() - 1 - y) * side() + side() - 1 - x;

  // What is said ------------------------------------------------------------------------------
  function along(walk, value, text) {
    const { forward, backward } = explorer.walks[walk];
    return value === 0 ? "" : `${text} ${value > 0 ? forward : backward}`;
  }
  function stepText(step) {
    if (!both()) return along(picked.walk, way().values[step], way().texts[step]) || "none";
    const { values, texts, lengths, unit } = now().plane, places = [step % side(), Math.floor(step / side())];
    const words = places.map((place, walk) => along(walk, values[place], texts[place])).filter(Boolean);
    return words.length ? `${words.join(", ")}; length ${lengths[step]}${unit}` : "none";
  }
  function promised(run) {
    if (!run.ends) return "no certificate: the votes did not suffice";
    const right = run.predicted === now().label ? "right" : "wrong", [first, second] = run.certified;
    if (both()) return `certified ${titled(run.predicted)} for every shift of length up to ${first}, in any direction: ${right}`;
    const { forward, backward } = explorer.walks[picked.walk];
    const reach = second === undefined ? `up to ${first}` : `from ${first} ${backward} to ${second} ${forward}`;
    return `certified ${titled(run.predicted)} ${reach}, ${right}`;
  }
  // The class that other steps are compared with: the certified one, or the one without deformation.
  const expected = (run) => run.ends ? run.predicted : seen(run).winners[centre()][0][0];
  function kind(run, step) {
    const { close, winners } = seen(run);
    if (close[step] === "1") return "close";
    return winners[step][0][0] === expected(run) ? "same" : "other";
  }
  function placed(run, inside) {
    if (!run.ends) return "nothing is certified";
    if (!both()) return inside ? "inside the certified range" : "outside the certified range";
    return inside ? "inside the certified disc" : "outside the certified disc, predicted at this point only";
  }
  function says(run, step) {
    const { winners, inside } = seen(run), [label, votes] = winners[step][0], what = kind(run, step);
    const share = `${votes} of ${(both() ? explorer.planeVotes : explorer.votes)[run.run]} votes`, held = inside[step] === "1";
    const answer = what === "close" ? `too close to call, ${titled(label)} first with ${share}` : `${titled(label)}, ${share}`;
    const right = label === now().label ? "right" : "wrong";
    const same = { same: "still the same class", other: "another class", close: "" }[what];
    const against = held && what === "other" ? ": against the certificate; `certifl attack` puts it to the test" : "";
    const still = step === centre() || !same ? "" : `, ${same}${against}`;
    return { answer, right: what === "close" ? "" : right, place: `${placed(run, held)}${still}` };
  }

  // Pictures ----------------------------------------------------------------------------------
  function loaded(png) {
    const picture = new Image();
    picture.src = `data:image/png;base64,${png}`;
    return picture;
  }
  function paint(target, picture, image, step) {
    const [height, width] = image.tile, pen = target.getContext("2d");
    target.height = Math.round(target.width * height / width);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(picture, step * width, 0, width, height, 0, 0, target.width, target.height);
  }
  let shown = null, source = null;
  function repaint() {
    if (!canvas || !shown || !shown.complete || !shown.naturalWidth) return;
    if (!both()) return paint(canvas, shown, now(), picked.step);
    const { plane } = now(), sheet = document.createElement("canvas");
    source = source || shift.pixels(shown);
    sheet.width = source.width;
    sheet.height = source.height;
    const [across, down] = [picked.step % side(), Math.floor(picked.step / side())].map((place) => plane.values[place]);
    sheet.getContext("2d").putImageData(shift.shifted(source, across, down, plane), 0, 0);
    paint(canvas, sheet, now(), 0);
  }
  function load() {
    if (!explorer.pictures) return;
    const wanted = loaded(both() ? now().plane.picture : way().strip);
    [shown, source] = [wanted, null];
    wanted.decode().then(() => { if (shown === wanted) repaint(); });
  }

  // The strips --------------------------------------------------------------------------------
  function drawStrip(line, run) {
    const container = line.querySelector(".strip"), values = way().values, last = values.length - 1;
    const width = Math.max(160, container.clientWidth), root = shape(container, "svg", { viewBox: `0 0 ${width} 34`, "aria-hidden": "true" });
    const layer = shape(root, "g", { class: `s${data.runs[run.run].slot}` });
    const x = (value) => thumb + (value - values[0]) / (values[last] - values[0]) * (width - 2 * thumb);
    const gap = (width - 2 * thumb) / last;
    shape(layer, "line", { class: "way", x1: thumb, x2: width - thumb, y1: 5, y2: 5 });
    if (run.ends) {
      const from = x(Math.max(values[0], run.ends[0])), to = x(Math.min(values[last], run.ends[1]));
      shape(layer, "rect", { class: "held", x: from, y: 1, width: Math.max(2, to - from), height: 8, rx: 2 });
    }
    values.forEach((value, step) => {
      const what = kind(run, step), tall = { same: 16, close: 8, other: 3 }[what];
      shape(layer, "rect", { class: `cell ${what}`, x: x(value) - gap * 0.36, y: 30 - tall, width: gap * 0.72, height: tall, rx: 1 });
    });
    const spot = shape(root, "line", { class: "spot", y1: 0, y2: 34 });
    root.addEventListener("click", (event) => {
      const box = root.getBoundingClientRect(), at = ((event.clientX - box.left) * width / box.width - thumb) / gap;
      picked.step = Math.max(0, Math.min(last, Math.round(at)));
      move();
    });
    const put = () => { for (const end of ["x1", "x2"]) spot.setAttribute(end, x(values[picked.step])); };
    spots.push({ put, line, run });
  }

  // Both directions ---------------------------------------------------------------------------
  // A square of shifts, drawn as the picture moves: to the right is to the right.
  function square(container, size, line) {
    const root = shape(container, "svg", { viewBox: `0 0 ${size} ${size}`, "aria-hidden": "true" });
    const gap = size / side(), half = size / 2, { values } = now().plane;
    const x = (point) => (column(point) + 0.5) * gap, y = (point) => (row(point) + 0.5) * gap;
    const scale = gap / (values[1] - values[0]);
    const disc = (layer, run) => run.ends && shape(layer, "circle", { class: "disc", cx: half, cy: half, r: Math.max(1, run.ends[1] * scale) });
    const nearest = (event) => {
      const box = root.getBoundingClientRect();
      const at = (from, start, length) => Math.max(0, Math.min(side() - 1, Math.floor((from - start) / length * side())));
      return pointAt(at(event.clientX, box.left, box.width), at(event.clientY, box.top, box.height));
    };
    return { root, gap, half, x, y, disc, nearest, line };
  }
  function drawMap(line, run) {
    const container = line.querySelector(".strip"), size = 208, map = square(container, size);
    const layer = shape(map.root, "g", { class: `s${data.runs[run.run].slot}` });
    for (let point = 0; point < side() ** 2; point++) {
      const what = kind(run, point), wide = map.gap * { same: 0.86, close: 0.5, other: 0.34 }[what];
      shape(layer, "rect", { class: `cell ${what}`, x: map.x(point) - wide / 2, y: map.y(point) - wide / 2, width: wide, height: wide, rx: 1 });
    }
    map.disc(layer, run);
    const spot = shape(map.root, "circle", { class: "spot", r: map.gap * 0.62 });
    map.root.addEventListener("click", (event) => { picked.step = map.nearest(event); move(); });
    spots.push({ put: () => place(spot, map), line, run });
  }
  function place(spot, map) {
    spot.setAttribute("cx", map.x(picked.step));
    spot.setAttribute("cy", map.y(picked.step));
  }
  let handle = null;
  function drawPad() {
    pad.replaceChildren();
    const board = square(pad, Math.max(160, pad.clientWidth));
    shape(board.root, "line", { class: "cross", x1: board.half, x2: board.half, y1: 0, y2: 2 * board.half });
    shape(board.root, "line", { class: "cross", y1: board.half, y2: board.half, x1: 0, x2: 2 * board.half });
    for (const run of now().runs) {
      const disc = run.plane && board.disc(shape(board.root, "g", { class: `s${data.runs[run.run].slot}` }), run);
      if (disc && data.runs[run.run].dash) disc.setAttribute("stroke-dasharray", data.runs[run.run].dash);
    }
    for (let point = 0; point < side() ** 2; point++) shape(board.root, "circle", { class: "point", cx: board.x(point), cy: board.y(point), r: 1.2 });
    const spot = shape(board.root, "circle", { class: "handle", r: 10 });
    handle = { put: () => place(spot, board), nearest: board.nearest };
    pad.setAttribute("aria-valuemax", String(side() ** 2 - 1));
  }
  function follow(event) {
    const point = handle.nearest(event);
    if (point !== picked.step) { picked.step = point; move(); }
  }
  function steer(event) {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!by && event.key !== "Home") return;
    event.preventDefault();
    const within = (at) => Math.max(0, Math.min(side() - 1, at));
    picked.step = by ? pointAt(within(column(picked.step) + by[0]), within(row(picked.step) + by[1])) : centre();
    move();
  }

  // All together ------------------------------------------------------------------------------
  function move() {
    const text = stepText(picked.step), heard = [];
    for (const { put: mark, line, run } of spots) {
      mark();
      const { answer, right, place: where } = says(run, picked.step), told = line.querySelector(".walker-says");
      told.replaceChildren();
      put(told, "b", answer);
      if (right) put(told, "span", right, `mark ${right}`);
      put(told, "span", where, "place");
      heard.push(`${data.runs[run.run].label}: ${answer}, ${where}`);
    }
    const knob = both() ? pad : slider;
    if (both()) {
      handle.put();
      pad.setAttribute("aria-valuenow", String(picked.step));
    } else slider.value = String(picked.step);
    knob.setAttribute("aria-valuetext", `${text}. ${heard.join(". ")}`);
    document.getElementById(both() ? "shift-text" : "step-text").textContent = text;
    repaint();
  }
  function drawStrips() {
    spots.length = 0;
    document.getElementById("walkers").classList.toggle("both", both());
    if (both()) drawPad();
    each("[data-walker]", (line) => {
      const run = now().runs.find((one) => one.run === Number(line.dataset.walker) && seen(one));
      line.hidden = !run;
      line.querySelector(".strip").replaceChildren();
      if (!run) return;
      line.querySelector("small").textContent = promised(run);
      (both() ? drawMap : drawStrip)(line, run);
    });
    move();
  }
  function pick(image) {
    picked.image = image;
    if (both() && !now().plane) choose(0);
    const { client, label, index } = now(), words = document.getElementById("picture-words");
    words.replaceChildren();
    put(words, "b", `True class: ${named(label)}.`);
    words.append(` Test image ${index} of the data, held by client ${client}.`);
    each('input[name="walk"]', (box) => { box.disabled = Number(box.value) === explorer.walks.length && !now().plane; });
    document.getElementById("along").hidden = both();
    if (pad) document.getElementById("both").hidden = !both();
    picked.step = centre();
    if (!both()) labelRail();
    load();
    drawStrips();
  }
  function labelRail() {
    const { values } = way(), last = values.length - 1, ends = document.getElementById("rail-ends");
    slider.max = String(last);
    ends.replaceChildren();
    put(ends, "span", values[0] ? stepText(0) : "none");
    put(ends, "span", values[0] ? "0" : "");
    put(ends, "span", stepText(last));
  }
  function choose(walk) {
    picked.walk = walk;
    each('input[name="walk"]', (box) => { box.checked = Number(box.value) === walk; });
  }

  // Controls ----------------------------------------------------------------------------------
  const pictures = document.getElementById("pictures");
  explorer.images.forEach((image, place) => {
    const label = put(pictures, "label", undefined, "thumb"), box = put(label, "input");
    box.type = "radio";
    box.name = "picture";
    box.addEventListener("change", () => pick(place));
    if (explorer.pictures) {
      const small = put(label, "canvas"), picture = loaded(image.walks[0].strip);
      small.width = 56;
      small.setAttribute("aria-hidden", "true");
      picture.decode().then(() => paint(small, picture, image, image.walks[0].values.indexOf(0)));
    }
    put(label, "span", `client ${image.client}: ${named(image.label)}`);
  });
  slider.addEventListener("input", () => { picked.step = Number(slider.value); move(); });
  each('input[name="walk"]', (box) => box.addEventListener("change", () => { picked.walk = Number(box.value); pick(picked.image); }));
  if (pad) {
    pad.addEventListener("pointerdown", (event) => { pad.setPointerCapture(event.pointerId); follow(event); });
    pad.addEventListener("pointermove", (event) => { if (pad.hasPointerCapture(event.pointerId)) follow(event); });
    pad.addEventListener("keydown", steer);
  }
  fit(drawStrips);
  // The first to be seen is certified rightly by most regimes, and has something to tell farther out.
  const telling = (image, run) => run.walks[0].winners.filter(([[label]]) => label !== image.label).length > 0;
  const held = explorer.images.map((image) => image.runs
    .filter((run) => run.ends && run.predicted === image.label)
    .reduce((sum, run) => sum + 1 + (telling(image, run) ? 0.1 : 0), 0));
  const start = held.indexOf(Math.max(...held));
  pictures.querySelectorAll("input")[start].checked = true;
  pick(start);
});
