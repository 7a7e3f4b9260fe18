// One panel for each perturbation of the page. Panels name their parts alike, so only the panel that
// is shown is in the document; its charts are made when it is first shown, and kept.
(() => {
  const panels = [...document.querySelectorAll("[data-panel]")], tabs = [...document.querySelectorAll("[role=tab]")];
  const fits = panels.map(() => null), drawnAt = panels.map(() => 0);
  let shown = 0;

  panels.forEach((panel, index) => {
    if (!index) return;
    const bare = (name) => panel.querySelectorAll(`[${name}]`).forEach((part) => part.setAttribute(name, part.getAttribute(name).replace(/--\d+$/, "")));
    ["id", "for", "aria-describedby"].forEach(bare);
    panel.remove();
  });

  function draw(index) {
    if (!fits[index]) {
      fits[index] = [];
      parts.forEach((begin) => begin(report.groups[index], (act) => fits[index].push(act)));
    } else if (drawnAt[index] !== document.body.clientWidth) fits[index].forEach((act) => act());
    drawnAt[index] = document.body.clientWidth;
  }
  // A reader who switches stays in the same section of the other panel.
  function reading() {
    const sections = [...panels[shown].querySelectorAll("section[id]")].filter((one) => one.getBoundingClientRect().top < innerHeight / 2);
    return sections.length ? sections[sections.length - 1] : null;
  }
  function show(index) {
    const before = reading(), top = before ? before.getBoundingClientRect().top : 0, from = shown;
    tabs.forEach((tab, at) => {
      tab.setAttribute("aria-selected", String(at === index));
      tab.tabIndex = at === index ? 0 : -1;
      if (at === index) tab.setAttribute("aria-controls", panels[index].id);
      else tab.removeAttribute("aria-controls");
    });
    if (index === from) return;
    panels[from].replaceWith(panels[index]);
    shown = index;
    draw(index);
    tabs[index].scrollIntoView({ block: "nearest", inline: "nearest" });
    const after = before && panels[index].querySelector(`#${before.id}`);
    if (after) scrollBy(0, after.getBoundingClientRect().top - top);
  }
  // Paper has no tabs and nothing to unfold: every panel is printed, the others as copies.
  const copies = [], unfolded = [];
  function copyOf(index) {
    show(index);
    const copy = panels[index].cloneNode(true);
    copy.querySelectorAll("[name]").forEach((box) => box.removeAttribute("name")); // or the page's own would be unchosen
    return copy;
  }
  addEventListener("beforeprint", () => {
    if (unfolded.length || copies.length) return;
    const here = shown;
    panels.forEach((_, index) => copies.push(index === here ? null : copyOf(index)));
    show(here);
    panels[here].before(...copies.slice(0, here));
    panels[here].after(...copies.slice(here + 1));
    unfolded.push(...document.querySelectorAll("details:not([open])"));
    unfolded.forEach((part) => { part.open = true; });
  });
  addEventListener("afterprint", () => {
    copies.splice(0).forEach((copy) => copy && copy.remove());
    unfolded.splice(0).forEach((part) => { part.open = false; });
  });

  const named = () => panels.findIndex((panel) => panel.id && `#${panel.id}` === location.hash);

  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => show(index));
    tab.addEventListener("keydown", (event) => {
      const last = tabs.length - 1;
      const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: last }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const next = (to + tabs.length) % tabs.length;
      show(next);
      tabs[next].focus();
    });
  });
  addEventListener("hashchange", () => {
    if (named() < 0) return;
    show(named());
    panels[shown].scrollIntoView();
  });
  document.querySelectorAll(".tabs").forEach((bar) => { bar.hidden = false; });
  draw(0);
  show(Math.max(0, named()));
  new ResizeObserver(() => {
    if (!copies.length && drawnAt[shown] !== document.body.clientWidth) draw(shown);
  }).observe(document.body);
})();
