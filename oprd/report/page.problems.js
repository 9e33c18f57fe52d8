"use strict";
// Lists of problems: filtered, sorted, a page at a time; texts are parsed when a problem is opened.
for (const board of document.querySelectorAll(".board")) {
  const STEP = 50;
  const find = (name) => board.querySelector(name);
  const data = JSON.parse(find(".rows").textContent);
  const list = find(".list"), heads = find(".heads"), more = find(".more"), count = find(".count");
  const firstOf = find(".first"), secondOf = find(".second");
  const filterBy = find(".filter-by"), orderBy = find(".order-by");
  const names = { 1: "\u2713 right", 0: "\u2717 wrong", x: "\u2717 no verdict", "?": "not graded" };
  const marks = { 1: "\u2713", 0: "\u2717", x: "!", "?": "\u00b7" };
  const pair = data.models.length > 1;
  let shown = [], drawn = 0, a = 0, b = pair ? 1 : 0;

  const make = (tag, text, name) => {
    const e = document.createElement(tag);
    if (text !== undefined) e.textContent = text;
    if (name) e.className = name;
    return e;
  };
  const right = (row, m) => { let n = 0; for (const v of row[3][m]) n += v === "1"; return n; };
  const share = (row, m) => (row[3][m] ? right(row, m) / row[3][m].length : NaN);
  const gain = (row) => share(row, b) - share(row, a);
  const all = (row, m) => share(row, m) === 1;

  function filters() {
    const [first, second] = [data.models[a], data.models[b]];
    if (!pair) return [
      ["all problems", () => true],
      ["always right", (r) => all(r, a)],
      ["sometimes right", (r) => right(r, a) > 0 && !all(r, a)],
      ["never right", (r) => right(r, a) === 0],
    ];
    return [
      ["all problems", () => true],
      ["where they differ", (r) => Math.abs(gain(r)) > 0],
      [`${second} is right more often`, (r) => gain(r) > 0],
      [`${second} is right less often`, (r) => gain(r) < 0],
      [`only ${second} solves`, (r) => right(r, b) > 0 && right(r, a) === 0],
      [`only ${first} solves`, (r) => right(r, a) > 0 && right(r, b) === 0],
      ["both are always right", (r) => all(r, a) && all(r, b)],
      ["neither is ever right", (r) => right(r, a) === 0 && right(r, b) === 0],
    ];
  }
  function orders() {
    const [first, second] = [data.models[a], data.models[b]];
    const by = (key) => (x, y) => {  // what has no value comes last
      const [p, q] = [key(x), key(y)];
      return (Number.isNaN(p) - Number.isNaN(q)) || (q - p) || 0;
    };
    const alone = [["problem", () => 0]];
    if (!pair) return [
      ["least right first", by((r) => -share(r, a))], ["most right first", by((r) => share(r, a))],
      ...alone,
    ];
    return [
      ["largest difference first", by((r) => Math.abs(gain(r)))],
      [`largest gain of ${second} first`, by(gain)],
      [`largest loss of ${second} first`, by((r) => -gain(r))],
      [`share of ${first}`, by((r) => share(r, a))],
      [`share of ${second}`, by((r) => share(r, b))],
      ...alone,
    ];
  }
  function options(select, texts) {
    const kept = Math.max(select.selectedIndex, 0);
    select.replaceChildren(...texts.map((text, i) => {
      const o = make("option", text);
      o.value = i;
      return o;
    }));
    select.selectedIndex = kept;
  }
  function update(models) {
    let rows = data.rows.map((_, i) => i);
    if (data.graded) {
      const kinds = filters(), ways = orders();
      if (models) {
        options(filterBy, kinds.map(([text, test]) => {
          const n = data.rows.reduce((sum, r) => sum + test(r), 0);
          return `${text} (${n.toLocaleString("en")})`;
        }));
        options(orderBy, ways.map(([text]) => text));
      }
      const test = kinds[filterBy.selectedIndex][1], compare = ways[orderBy.selectedIndex][1];
      rows = rows.filter((i) => test(data.rows[i]));
      rows.sort((i, j) => compare(data.rows[i], data.rows[j]) || i - j);
    }
    shown = rows;
    drawn = 0;
    list.replaceChildren();
    const columns = ["problem", ...models_shown().map((m) => data.models[m])];
    if (data.graded && pair) columns.push("points");
    heads.replaceChildren(...columns.map((text) => make("span", text)));
    heads.className = list.className = `${pair ? "two" : "one"}${data.graded ? "" : " bare"}`;
    heads.classList.add("heads");
    list.classList.add("list");
    append(STEP);
  }
  const models_shown = () => (!data.graded ? [] : pair ? [a, b] : [a]);

  function append(number) {
    const part = document.createDocumentFragment();
    for (const i of shown.slice(drawn, drawn + number)) part.append(line(i));
    list.append(part);
    drawn = Math.min(drawn + number, shown.length);
    more.hidden = drawn === shown.length;
    const of = data.rows.length.toLocaleString("en");
    count.textContent = `${drawn.toLocaleString("en")} of ${shown.length.toLocaleString("en")} ` +
      `problems are listed${shown.length < data.rows.length ? `, of ${of} in all` : ""}.`;
  }
  function line(i) {
    const row = data.rows[i];
    const details = make("details"), summary = make("summary");
    const number = make("span", String(row[0]), "number");
    number.prepend(make("span", "problem ", "unseen"));
    summary.append(number);
    for (const m of models_shown()) {
      const cell = make("span", row[3][m] ? `${right(row, m)}/${row[3][m].length}` : "-", "share");
      cell.prepend(make("span", `, ${data.models[m]}: `, "unseen"));
      cell.style.setProperty("--share", `${100 * (share(row, m) || 0)}%`);
      summary.append(cell);
    }
    if (data.graded && pair) {
      const points = 100 * gain(row);
      const text = Number.isNaN(points) ? "-" : `${points > 0 ? "+" : ""}${points.toFixed(0)}`;
      const cell = make("span", text, `points ${points > 0 ? "right" : points < 0 ? "wrong" : ""}`);
      cell.append(make("span", " points: ", "unseen"));
      summary.append(cell);
    }
    summary.append(make("span", row[2], "say"));
    details.append(summary);
    details.addEventListener("toggle", () => {
      if (details.open && !details.querySelector(".body")) details.append(body(i));
    });
    return details;
  }
  const parsed = new Map();
  function texts(i) {
    const chunk = Math.floor(i / data.chunk);
    if (!parsed.has(chunk)) {
      const script = find(`.texts[data-chunk="${chunk}"]`);
      parsed.set(chunk, script ? JSON.parse(script.textContent) : {});
    }
    return parsed.get(chunk)[i];
  }
  function text(value, label) {
    const pre = make("pre", value);
    pre.tabIndex = 0;
    pre.setAttribute("role", "region");
    pre.setAttribute("aria-label", label);
    return pre;
  }
  function body(i) {
    const row = data.rows[i], found = texts(i), box = make("div", undefined, "body");
    if (found) box.append(text(found[0], "Prompt"));
    else box.append(make("p", `The page holds no responses to this problem, to stay small: they are in samples.jsonl of each model, with "problem": ${row[0]}.`, "quiet"));
    if (row[1]) {
      const answer = make("p", "Answer: ");
      answer.append(make("code", row[1]));
      box.append(answer);
    }
    const both = make("div", undefined, "pair");
    for (const m of pair ? [a, b] : [a]) both.append(responses(row, m, found?.[1][m] ?? {}));
    box.append(both);
    return box;
  }
  function responses(row, m, samples) {
    const box = make("div"), title = make("h4", data.models[m]);
    box.append(title);
    const verdicts = [...row[3][m]];
    if (data.graded && verdicts.length > 1) {
      const strip = make("p", verdicts.map((v) => marks[v]).join(" "), "quiet strip");
      strip.setAttribute("aria-label", `${right(row, m)} of ${verdicts.length} samples are right`);
      strip.setAttribute("role", "img");
      box.append(strip);
    }
    const there = Object.keys(samples).map(Number);
    if (!there.length) {
      box.append(make("p", verdicts.length ? "No response of it is on this page." : "It was not asked this.", "quiet"));
      return box;
    }
    const grade = make("span", "", "grade"), facts = make("p", "", "quiet"), pre = text("", "");
    title.append(" ", grade);
    const show = (s) => {
      const [response, tokens, cut] = samples[s], v = verdicts[s];
      grade.textContent = names[v];
      grade.className = `grade ${v === "1" ? "right" : v === "?" ? "" : "wrong"}`;
      const size = tokens === null ? "" : `, ${tokens.toLocaleString("en")} tokens`;
      facts.textContent = `Sample ${s + 1} of ${verdicts.length}${size}${cut ? ", cut before its end" : ""}.`;
      pre.textContent = response;
      pre.setAttribute("aria-label", `Response of ${data.models[m]}, sample ${s + 1}`);
      pre.scrollTop = 0;
    };
    if (there.length > 1) {
      const label = make("label", "Sample "), select = make("select");
      options(select, there.map((s) => `${s + 1} ${names[verdicts[s]]}`));
      const most = [...new Set(verdicts)].sort((x, y) =>
        verdicts.filter((v) => v === y).length - verdicts.filter((v) => v === x).length)[0];
      select.selectedIndex = Math.max(there.findIndex((s) => verdicts[s] === most), 0);
      select.addEventListener("change", () => show(there[select.selectedIndex]));
      label.append(select);
      box.append(label);
      show(there[select.selectedIndex]);
    } else show(there[0]);
    box.append(pre, facts);
    return box;
  }
  for (const select of [firstOf, secondOf]) {
    select?.addEventListener("change", () => {
      a = Number(firstOf.value);
      b = Number(secondOf.value);
      update(true);
    });
  }
  filterBy?.addEventListener("change", () => update(false));
  orderBy?.addEventListener("change", () => update(false));
  more.addEventListener("click", () => {
    const next = drawn;
    append(4 * STEP);
    list.children[next]?.querySelector("summary").focus();
  });
  update(true);
}
