// Moves along the frontier of the study that stands in #study: two sliders, two policies, one map. No library, no network.
"use strict";
(() => {
  const study = JSON.parse(document.getElementById("study").textContent);
  const get = (id) => document.getElementById(id);
  const mib = (bytes) => bytes / 1048576;
  // As the tables write numbers: with an exponent where there would be many zeros.
  const fixed = (x, digits = 3) => (x === null ? "–" : x !== 0 && Math.abs(x) < 9e-5 ? x.toExponential(digits - 1) : Number(x.toPrecision(digits)).toString());
  const evaluated = study.policies.filter((p) => p.known === "evaluated");
  const latency = get("max-latency"), size = get("max-size"), first = get("first"), second = get("second");

  const extent = (values, pad) => {
    const low = Math.min(...values), high = Math.max(...values), gap = (high - low || 1) * pad;
    return [low - gap, high + gap];
  };

  function prepare(slider, values) {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    slider.min = low; slider.max = high; slider.step = (high - low) / 500 || 1; slider.value = high;
  }

  // The least loss among the evaluated policies whose upper bound and whose size are allowed.
  function best() {
    const fits = evaluated.filter((p) => p.hi <= Number(latency.value) + 1e-9 && p.size <= Number(size.value) + 1e-9);
    return fits.length ? fits.reduce((a, b) => (b.kl < a.kl ? b : a)) : null;
  }

  function words(p) {
    if (!p) return "no policy fits";
    const error = p.stderr === null ? "" : ` ± ${fixed(p.stderr, 1)}`;
    const range = p.known === "evaluated" ? ` [${fixed(p.lo, 4)}, ${fixed(p.hi, 4)}]` : " (predicted)";
    const ppl = p.perplexity === null ? "" : `, perplexity ${fixed(p.perplexity, 4)}`;
    return `${p.name}: ${fixed(p.ms, 4)} ms${range}, KL ${fixed(p.kl)}${error}${ppl}, ${fixed(mib(p.size), 4)} MiB, ${p.label}`;
  }

  const spread = (kl) => Math.asinh(kl / study.knee);

  // Round numbers of an axis, about as many as asked for.
  function ticks(low, high, n) {
    const rough = (high - low) / n, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const first = Math.ceil(low / step), found = [];
    for (let i = first; i * step <= high; i++) found.push(i * step);
    return found;
  }

  // Zero, and the powers of ten that losses of the study reach.
  function powers(high) {
    const found = [0], last = Math.floor(Math.log10(high));
    for (let power = Math.ceil(Math.log10(study.knee)); power <= last; power++) found.push(10 ** power);
    return found;
  }

  function draw(chosen, other) {
    // As wide as its place, so that its letters keep their size on a telephone.
    const w = Math.max(280, Math.min(760, get("explorer").parentElement.clientWidth || 760)), [h, m] = [320, 72];
    const [x0, x1] = extent(study.policies.map((p) => p.ms), 0.05), [y0, y1] = extent(study.policies.map((p) => spread(p.kl)), 0.06);
    const x = (ms) => m + ((ms - x0) / (x1 - x0)) * (w - m - 24), y = (kl) => h - m + 8 - ((spread(kl) - y0) / (y1 - y0)) * (h - m - 8);
    const parts = [`<rect x="${m}" y="0" width="${w - m - 24}" height="${h - m + 8}" fill="none" stroke="#e2e5ea"/>`];
    const limit = x(Number(latency.value));
    parts.push(`<line x1="${limit}" x2="${limit}" y1="0" y2="${h - m + 8}" stroke="#cc79a7" stroke-dasharray="6 4"/>`);
    for (const ms of ticks(x0, x1, w < 500 ? 3 : 6))
      parts.push(`<text x="${x(ms)}" y="${h - m + 24}" text-anchor="middle">${fixed(ms)}</text>`);
    for (const kl of powers(Math.max(...study.policies.map((p) => p.kl), study.knee)))
      parts.push(`<text x="${m - 5}" y="${y(kl) + 4}" text-anchor="end">${kl === 0 ? "0" : kl < 9e-5 ? kl.toExponential(0) : fixed(kl)}</text>`);
    parts.push(`<text x="${(w + m) / 2}" y="${h - 22}" text-anchor="middle">latency, ${study.unit}</text>`);
    parts.push(`<text transform="translate(12 ${(h - m + 8) / 2}) rotate(-90)" text-anchor="middle">KL divergence, nats per token</text>`);
    const colour = { dense: "#1f2430", chosen: "#009e73", baseline: "#d55e00", search: "#0072b2", predicted: "#8a8f98" };
    // What was evaluated lies above what was predicted, and the answer above all.
    const level = (p) => (p.known === "evaluated") + (p.group === "chosen");
    const order = study.policies.map((p, index) => [p, index]).sort(([a], [b]) => level(a) - level(b));
    order.forEach(([p, index]) => {
      const ring = p === chosen ? ' stroke="#1f2430" stroke-width="3"' : p === other ? ' stroke="#e69f00" stroke-width="3"' : "";
      const fill = p.known === "evaluated" ? colour[p.group] : "#ffffff", edge = p.known === "evaluated" ? "" : ' stroke="#8a8f98"';
      parts.push(`<circle data-index="${index}" cx="${x(p.ms)}" cy="${y(p.kl)}" r="${p.known === "evaluated" ? 7 : 5}" fill="${fill}"${ring || edge}><title></title></circle>`);
    });
    const plot = get("plot");
    const named = { chosen: "the answer", search: "search", baseline: "simple policies", dense: "dense model", predicted: "solver, predicted" };
    const present = Object.keys(named).filter((group) => study.policies.some((p) => p.group === group));
    const keys = present.map((group) => `<span class="key"><i style="${group === "predicted" ? "border:1px solid" : "background:"}${colour[group]}"></i>${named[group]}</span>`);
    plot.innerHTML = `<svg viewBox="0 0 ${w} ${h}" role="img" aria-label="latency against loss">${parts.join("")}</svg><p>${keys.join("")}</p>`;
    plot.querySelectorAll("circle").forEach((dot) => {
      const index = Number(dot.dataset.index);
      dot.firstChild.textContent = words(study.policies[index]);
      dot.addEventListener("click", () => { first.value = String(index); show(); });
    });
  }

  function map(p, q) {
    const table = document.createElement("table");
    table.className = "map";
    study.kinds.forEach((kind, row) => {
      const line = table.insertRow(), head = document.createElement("th");
      head.textContent = kind;
      line.append(head);
      for (let block = 0; block < study.blocks; block++) {
        const cell = line.insertCell(), own = p.cells[row][block], theirs = q ? q.cells[row][block] : own;
        if (own === null) { cell.className = "none"; continue; }
        const format = study.formats[own];
        cell.style.background = format.colour;
        cell.style.color = format.ink;
        cell.textContent = format.bits;
        cell.title = `block ${block}: ${format.name}` + (own === theirs || theirs === null ? "" : `, there ${study.formats[theirs].name}`);
        if (own !== theirs) cell.style.boxShadow = "inset 0 0 0 2px #e69f00";
      }
    });
    get("explored-map").replaceChildren(table);
  }

  function show() {
    const p = study.policies[Number(first.value)], q = second.value === "" ? null : study.policies[Number(second.value)];
    get("first-words").textContent = words(p);
    if (q) {
      const cells = p.cells.flat(), others = q.cells.flat(), n = cells.filter((cell, i) => cell !== others[i]).length;
      const kinds = p.known === q.known ? "" : " One of them is predicted: the difference is no measurement.";
      get("second-words").textContent = `${words(q)}. Against it: ${fixed(p.ms - q.ms)} ms, KL ${fixed(p.kl - q.kl)}, ` +
        `${fixed(mib(p.size - q.size))} MiB; ${n} of ${cells.filter((c) => c !== null).length} groups of layers differ (framed).${kinds}`;
    } else get("second-words").textContent = "";
    draw(p, q);
    map(p, q);
  }

  // The solver's curve below and above a latency, and what a millisecond more buys between the two.
  function price(ms) {
    const curve = study.policies.filter((p) => p.buys !== null && p.buys > 0).sort((a, b) => a.ms - b.ms);
    const at = curve.filter((p) => p.ms <= ms).pop();
    return at ? ` Here 1 ms more would buy about ${fixed(at.buys, 2)} nats per token (predicted).` : "";
  }

  function slide() {
    get("latency-now").textContent = `${fixed(Number(latency.value), 4)} ms`;
    get("size-now").textContent = `${fixed(mib(Number(size.value)), 4)} MiB`;
    const found = best();
    get("best").textContent = `Best within both: ${words(found)}.${price(Number(latency.value))}`;
    if (found) { first.value = String(study.policies.indexOf(found)); show(); } else draw(null, null);
  }

  prepare(latency, evaluated.map((p) => p.hi));
  prepare(size, evaluated.map((p) => p.size));
  second.append(new Option("nothing", ""));
  study.policies.forEach((p, index) => {
    const text = p.known === "evaluated" ? p.name : `${p.name} (predicted)`;
    first.append(new Option(text, String(index)));
    second.append(new Option(text, String(index)));
  });
  window.addEventListener("resize", show);
  latency.addEventListener("input", slide);
  size.addEventListener("input", slide);
  first.addEventListener("change", show);
  second.addEventListener("change", show);
  if (study.limit !== null) latency.value = study.limit;
  slide();
  const answer = study.policies.findIndex((p) => p.group === "chosen");
  if (answer >= 0) { first.value = String(answer); show(); }
  get("explorer").hidden = false;
})();
