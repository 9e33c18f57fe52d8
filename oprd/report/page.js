"use strict";
(() => {
  const data = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const store = (area, key, value) => {  // storage may be refused, as for some file:// pages
    try {
      if (value === undefined) return area().getItem(key);
      area().setItem(key, value);
    } catch { /* then nothing is remembered */ }
    return null;
  };
  const local = (key, value) => store(() => localStorage, key, value);
  const session = (key, value) => store(() => sessionStorage, key + location.pathname, value);

  const isDark = () => (root.dataset.theme ?? (systemDark.matches ? "dark" : "light")) === "dark";
  const escaped = Object.keys(data.dark).map((c) => c.replace(/[()]/g, "\\$&"));
  const anyColour = new RegExp(escaped.join("|"), "g");
  const hidden = new Set();
  const drawn = new Set();
  const coarse = matchMedia("(pointer: coarse)").matches;

  function figure(key) {
    const text = JSON.stringify(data.figures[key]);
    const own = JSON.parse(isDark() ? text.replace(anyColour, (c) => data.dark[c]) : text);
    for (const trace of own.data) trace.visible = !hidden.has(trace.meta);
    if (coarse) own.layout.dragmode = false;
    return own;
  }
  function draw(key) {
    drawn.add(key);
    const f = figure(key);
    return Plotly.react(key, f.data, f.layout, { responsive: true, displayModeBar: false });
  }
  const redraw = () => drawn.forEach(draw);
  const waiting = new IntersectionObserver((entries) => {
    for (const e of entries) if (e.isIntersecting) { waiting.unobserve(e.target); draw(e.target.id); }
  }, { rootMargin: "700px" });
  const plots = [...document.querySelectorAll(".plot")];

  const button = document.getElementById("theme");
  const name = () => { button.textContent = isDark() ? "Light colours" : "Dark colours"; };
  const saved = local("oprd-theme");
  if (saved === "dark" || saved === "light") root.dataset.theme = saved;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    local("oprd-theme", root.dataset.theme);
    name(); redraw();
  });
  systemDark.addEventListener("change", () => { name(); redraw(); });
  name();

  const boxes = [...document.querySelectorAll("input[data-group]")];
  const off = JSON.parse(session("oprd-hidden") ?? "[]");
  for (const box of boxes) {
    const group = Number(box.dataset.group);
    if (off.includes(group)) { box.checked = false; hidden.add(group); }
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(group); else hidden.add(group);
      session("oprd-hidden", JSON.stringify([...hidden]));
      redraw();
    });
  }
  for (const plot of plots) waiting.observe(plot);
  addEventListener("beforeprint", () => plots.forEach((p) => draw(p.id)));

  const pause = document.getElementById("pause");
  const seconds = pause ? Number(pause.dataset.seconds) : 0;
  const kept = JSON.parse(session("oprd-view") ?? "null");
  if (kept) {
    session("oprd-view", "null");
    for (const d of document.querySelectorAll("details[id]")) d.open = kept.open.includes(d.id);
    history.scrollRestoration = "manual";
    requestAnimationFrame(() => scrollTo(0, kept.y));
    if (kept.focus) document.getElementById(kept.focus)?.focus({ preventScroll: true });
  }
  if (pause) {
    let timer = 0;
    const reload = () => {
      const open = [...document.querySelectorAll("details[open]")].map((d) => d.id);
      const focus = document.activeElement?.id ?? "";
      session("oprd-view", JSON.stringify({ y: scrollY, open, focus }));
      location.reload();
    };
    const start = () => { timer = setTimeout(reload, seconds * 1000); };
    pause.addEventListener("click", () => {
      if (timer) { clearTimeout(timer); timer = 0; } else start();
      pause.textContent = timer ? "Pause reloading" : "Go on reloading";
    });
    start();
  }
})();
