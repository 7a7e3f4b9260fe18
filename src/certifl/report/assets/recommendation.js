// Which algorithm for which client, at the accuracy that a client accepts. Numbers, intervals and
// texts are part of the page; only the choice among the algorithms that reach it is made here.
parts.push((data) => {
  const { algorithm, put } = drawing;
  const recommendation = data.recommendation;
  if (!recommendation) return;
  const slider = document.getElementById("accepted");
  const label = (index) => data.runs[index].label;
  const listed = (names) => names.length === 1 ? names[0] : `${names.slice(0, -1).join(", ")} and ${names[names.length - 1]}`;

  function recommend(client, least) {
    if (client.why) return { client, reach: [], tied: [], why: client.why };
    const reach = client.order.filter((index) => client.accuracy[index][0] >= least - 1e-9);
    const best = reach[0];
    if (best === undefined) return { client, reach };
    const pair = (other) => client.pairs[`${best}-${other}`];
    const tied = reach.slice(1).filter((index) => pair(index)[1] === 0).sort((a, b) => a - b);
    const alone = recommendation.local === null || recommendation.local === best ? undefined : pair(recommendation.local);
    const sure = client.accuracy[best][1] >= least - 1e-9;
    return { client, reach, best, tied, sure, next: reach.length > 1 ? pair(reach[1]) : undefined, alone };
  }

  function clients(numbers) {
    const parts = [];
    for (const number of [...numbers].sort((a, b) => a - b)) {
      const last = parts[parts.length - 1];
      if (last && number === last[1] + 1) last[1] = number;
      else parts.push([number, number]);
    }
    const texts = parts.flatMap(([from, to]) => from === to ? [`${from}`] : to === from + 1 ? [`${from}`, `${to}`] : [`${from}–${to}`]);
    return `client${numbers.length > 1 ? "s" : ""} ${texts.join(", ")}`;
  }

  function groups(found) {
    const answers = new Map();
    for (const one of found) {
      const indices = one.best === undefined ? [] : [one.best, ...one.tied].sort((a, b) => a - b), key = one.why ? "few" : indices.join();
      if (!answers.has(key)) answers.set(key, { indices, numbers: [], few: Boolean(one.why) });
      answers.get(key).numbers.push(one.client.client);
    }
    const before = (a, b) => { const at = a.findIndex((index, i) => index !== b[i]); return at < 0 ? 0 : a[at] - b[at]; };
    return [...answers.values()].sort((a, b) => b.numbers.length - a.numbers.length || a.indices.length - b.indices.length || before(a.indices, b.indices));
  }

  function showGroups(found) {
    const list = document.getElementById("recommendations"), answers = groups(found);
    list.replaceChildren();
    for (const { indices, numbers, few } of answers.slice(0, recommendation.most)) {
      const item = put(list, "li");
      if (few) {
        put(item, "span", recommendation.few, "verdict");
        put(item, "span", clients(numbers), "who");
        continue;
      }
      const choice = put(item, "span", undefined, "choice");
      choice.append(...indices.map(algorithm));
      if (!indices.length) choice.textContent = "No algorithm reaches this accuracy";
      if (indices.length > 1) put(item, "span", recommendation.none, "verdict");
      put(item, "span", clients(numbers), "who");
    }
    const rest = answers.slice(recommendation.most).flatMap(({ numbers }) => numbers);
    if (!rest.length) return;
    const item = put(list, "li");
    put(item, "span", "Other answers, in the table below:", "verdict");
    put(item, "span", clients(rest), "who");
  }

  function showRow(row, { client, best, tied, sure, next, alone, why }, least) {
    const [images, choice, radius, accuracy, ahead, over] = row.querySelectorAll("td");
    images.textContent = client.images;
    if (best === undefined) {
      const top = client.accuracy.reduce((a, b) => b[0] > a[0] ? b : a);
      choice.textContent = why ? `none: ${why}` : `none: the best reaches ${top[3]}`;
      for (const cell of [radius, accuracy, ahead, over]) cell.textContent = "–";
      return;
    }
    const others = tied.length ? `; ${recommendation.none} from ${listed(tied.map(label))}` : "";
    choice.textContent = `${label(best)}${others}`;
    radius.textContent = client.acr[best];
    accuracy.textContent = client.accuracy[best][3].replace(/ %/g, "\u00a0%") + (least > 0 && !sure ? ", may be less" : "");
    ahead.textContent = next ? next[0] : "–";
    over.textContent = alone ? alone[0] : "–";
  }

  function status(found, least) {
    if (!least) return "";
    const unsure = found.filter((one) => one.best !== undefined && !one.sure).length, share = `${Math.round(100 * least)}\u00a0%`;
    const over = found.filter((one) => one.best !== undefined && one.reach.length < data.runs.length);
    const close = over.filter(({ client }) => client.accuracy.some(([value, , high]) => value < least - 1e-9 && high >= least)).length;
    const parts = [];
    if (over.length) parts.push(`for ${over.length} of ${found.length} clients an algorithm is below ${share} on the test images and is left out${close ? ` (for ${close} of them its 95\u00a0% interval reaches ${share})` : ""}`);
    if (unsure) parts.push(`for ${unsure} the recommended algorithm may miss it: the 95\u00a0% interval of its accuracy begins below ${share}`);
    const text = parts.join("; ");
    return text ? `${text[0].toUpperCase()}${text.slice(1)}.` : `Every algorithm reaches ${share} for every client, and the recommended ones with their whole 95\u00a0% interval.`;
  }

  function show() {
    const least = Number(slider.value) / 100, text = `${slider.value} %`;
    const found = recommendation.clients.map((client) => recommend(client, least));
    const rows = document.querySelectorAll("#recommendation-table tbody tr");
    document.getElementById("accepted-text").textContent = text;
    slider.setAttribute("aria-valuetext", text);
    showGroups(found);
    found.forEach((one, index) => showRow(rows[index], one, least));
    document.getElementById("recommendation-status").textContent = status(found, least);
  }
  slider.value = "0";
  slider.addEventListener("input", show);
});
