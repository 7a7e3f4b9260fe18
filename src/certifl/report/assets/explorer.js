// The image explorer: a picture along sweeps of the deformation, and the votes on it.
parts.push((data, fit) => {
  const { shape, each, put } = drawing;
  const explorer = data.explorer;
  if (!explorer) return;
  const picked = { image: 0, sweep: 0, step: 0 };
  const slider = document.getElementById("step"), canvas = document.getElementById("picture");
  const cursors = [];
  const thumb = 10;  // half a thumb in pixels: the strips begin and end where its center does

  const named = (label) => explorer.names && explorer.names[label] !== undefined ? explorer.names[label] : String(label);
  const titled = (label) => explorer.names && explorer.names[label] === String(label) || !explorer.names ? `class ${label}` : named(label);
  const now = () => explorer.images[picked.image];
  const sweep = () => now().sweeps[picked.sweep];
  const seen = (run) => run.sweeps[picked.sweep];
  const center = () => sweep().values.indexOf(0);

  // Words -------------------------------------------------------------------------------------
  function stepText(step) {
    const { forward, backward } = explorer.sweeps[picked.sweep], value = sweep().values[step];
    return value === 0 ? "none" : `${sweep().texts[step]} ${value > 0 ? forward : backward}`;
  }
  function promised(run) {
    if (!run.ends) return "no certificate: too few votes agree";
    const right = run.predicted === now().label ? "correct" : "wrong", [first, second] = run.certified;
    const { forward, backward } = explorer.sweeps[picked.sweep];
    const reach = second === undefined ? `up to ${first}` : `from ${first} ${backward} to ${second} ${forward}`;
    return `certified ${titled(run.predicted)} ${reach}, ${right}`;
  }
  // The class that other steps are compared with: the certified one, or the one without deformation.
  const expected = (run) => run.ends ? run.predicted : seen(run).winners[center()][0][0];
  function kind(run, step) {
    const { close, winners } = seen(run);
    if (close[step] === "1") return "close";
    return winners[step][0][0] === expected(run) ? "same" : "other";
  }
  function range(run, inside) {
    if (!run.ends) return "nothing is certified";
    return inside ? "inside the certified range" : "outside the certified range";
  }
  function answerOf(run, step) {
    const { winners, inside } = seen(run), [label, votes] = winners[step][0], what = kind(run, step);
    const share = `${votes} of ${explorer.votes[run.run]} votes`, certified = inside[step] === "1";
    const answer = what === "close" ? `too close to call, ${titled(label)} first with ${share}` : `${titled(label)}, ${share}`;
    const correct = label === now().label ? "correct" : "wrong";
    const same = { same: "still the same class", other: "another class", close: "" }[what];
    const against = certified && what === "other" ? ": against the certificate; test it with `certifl attack`" : "";
    const still = step === center() || !same ? "" : `, ${same}${against}`;
    return { answer, verdict: what === "close" ? "" : correct, where: `${range(run, certified)}${still}` };
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
  let shown = null;
  function repaint() {
    if (canvas && shown && shown.complete && shown.naturalWidth) paint(canvas, shown, now(), picked.step);
  }
  function load() {
    if (!explorer.pictures) return;
    const next = loaded(sweep().strip);
    shown = next;
    next.decode().then(() => { if (shown === next) repaint(); });
  }

  // The strips --------------------------------------------------------------------------------
  function drawStrip(line, run) {
    const container = line.querySelector(".strip"), values = sweep().values, last = values.length - 1;
    const width = Math.max(160, container.clientWidth), root = shape(container, "svg", { viewBox: `0 0 ${width} 34`, "aria-hidden": "true" });
    const layer = shape(root, "g", { class: `s${data.runs[run.run].slot}` });
    const x = (value) => thumb + (value - values[0]) / (values[last] - values[0]) * (width - 2 * thumb);
    const gap = (width - 2 * thumb) / last;
    shape(layer, "line", { class: "track", x1: thumb, x2: width - thumb, y1: 5, y2: 5 });
    if (run.ends) {
      const from = x(Math.max(values[0], run.ends[0])), to = x(Math.min(values[last], run.ends[1]));
      shape(layer, "rect", { class: "certified", x: from, y: 1, width: Math.max(2, to - from), height: 8, rx: 2 });
    }
    values.forEach((value, step) => {
      const what = kind(run, step), tall = { same: 16, close: 8, other: 3 }[what];
      shape(layer, "rect", { class: `cell ${what}`, x: x(value) - gap * 0.36, y: 30 - tall, width: gap * 0.72, height: tall, rx: 1 });
    });
    const cursor = shape(root, "line", { class: "cursor", y1: 0, y2: 34 });
    root.addEventListener("click", (event) => {
      const box = root.getBoundingClientRect(), at = ((event.clientX - box.left) * width / box.width - thumb) / gap;
      picked.step = Math.max(0, Math.min(last, Math.round(at)));
      move();
    });
    const put = () => { for (const end of ["x1", "x2"]) cursor.setAttribute(end, x(values[picked.step])); };
    cursors.push({ put, line, run });
  }

  // All together ------------------------------------------------------------------------------
  function move() {
    const text = stepText(picked.step), heard = [];
    for (const { put: mark, line, run } of cursors) {
      mark();
      const { answer, verdict, where } = answerOf(run, picked.step), output = line.querySelector(".explored-answer");
      output.replaceChildren();
      put(output, "b", answer);
      if (verdict) put(output, "span", verdict, `mark ${verdict}`);
      put(output, "span", where, "where");
      heard.push(`${data.runs[run.run].label}: ${answer}, ${where}`);
    }
    slider.value = String(picked.step);
    slider.setAttribute("aria-valuetext", `${text}. ${heard.join(". ")}`);
    document.getElementById("step-text").textContent = text;
    repaint();
  }
  function drawStrips() {
    cursors.length = 0;
    each("[data-explored]", (line) => {
      const run = now().runs.find((one) => one.run === Number(line.dataset.explored));
      line.hidden = !run;
      line.querySelector(".strip").replaceChildren();
      if (!run) return;
      line.querySelector("small").textContent = promised(run);
      drawStrip(line, run);
    });
    move();
  }
  function pick(image) {
    picked.image = image;
    const { client, label, index } = now(), words = document.getElementById("picture-words");
    words.replaceChildren();
    put(words, "b", `True class: ${named(label)}.`);
    words.append(` Test image ${index} of client ${client}.`);
    picked.step = center();
    labelRail();
    load();
    drawStrips();
  }
  function labelRail() {
    const { values } = sweep(), last = values.length - 1, ends = document.getElementById("rail-ends");
    slider.max = String(last);
    ends.replaceChildren();
    put(ends, "span", values[0] ? stepText(0) : "none");
    put(ends, "span", values[0] ? "0" : "");
    put(ends, "span", stepText(last));
  }
  // Controls ----------------------------------------------------------------------------------
  const pictures = document.getElementById("pictures");
  explorer.images.forEach((image, number) => {
    const label = put(pictures, "label", undefined, "thumb"), box = put(label, "input");
    box.type = "radio";
    box.name = "picture";
    box.addEventListener("change", () => pick(number));
    if (explorer.pictures) {
      const small = put(label, "canvas"), picture = loaded(image.sweeps[0].strip);
      small.width = 56;
      small.setAttribute("aria-hidden", "true");
      picture.decode().then(() => paint(small, picture, image, image.sweeps[0].values.indexOf(0)));
    }
    put(label, "span", `client ${image.client}: ${named(image.label)}`);
  });
  slider.addEventListener("input", () => { picked.step = Number(slider.value); move(); });
  each('input[name="sweep"]', (box) => box.addEventListener("change", () => { picked.sweep = Number(box.value); pick(picked.image); }));
  fit(drawStrips);
  // The first image is certified correctly by most algorithms, and changes its class farther out.
  const changes = (image, run) => run.sweeps[0].winners.filter(([[label]]) => label !== image.label).length > 0;
  const score = explorer.images.map((image) => image.runs
    .filter((run) => run.ends && run.predicted === image.label)
    .reduce((sum, run) => sum + 1 + (changes(image, run) ? 0.1 : 0), 0));
  const start = score.indexOf(Math.max(...score));
  pictures.querySelectorAll("input")[start].checked = true;
  pick(start);
});
