"use strict";
// Draws the plots of the report from the numbers in #data. Each plot is a function of the state that returns
// { option, header, rows } (what is drawn, and the same as a table), or null where there is nothing to draw.

const { runs } = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const ROLES = ["weight", "activation", "gradient"];
const MIB = 2 ** 23; // bits
const PASSES = { forward: "circle", dgrad: "rect", wgrad: "triangle" };
const SCHEME_COLORS = { encoded: 0, fp32: 1, bf16: 2 };
const ROLE_COLORS = {
  weight: 0, activation: 2, gradient: 1, master: 3, optimizer_state: 4, weight_gradient: 5, norm_input: 6, addend: 7,
  forward: 0, dgrad: 1, wgrad: 2, update: 4,
};
const SYMBOLS = ["circle", "rect", "triangle", "diamond", "pin", "roundRect"];
const DASHES = ["solid", "dashed", "dotted"];
const state = { hidden: new Set(), run: 0, cost: null, size: null, metric: null, codecRole: null, machine: null, what: "seconds", layer: null, tensor: null };

// --- numbers and words ------------------------------------------------------------------------------------------------

const isNumber = (value) => typeof value === "number";
const words = (name) => name.replaceAll("_", " ");
function figure(value) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-4 || size >= 1e9) ? value.toExponential(3) : value.toLocaleString("en", { maximumSignificantDigits: 4 });
}
const power = (value) => (Math.abs(Math.log2(value) % 1) < 1e-4 ? `2^${Math.round(Math.log2(value))}` : figure(value)); // of five digits
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const deviation = (values) => (values.length < 2 ? 0 : Math.sqrt(values.reduce((sum, value) => sum + (value - mean(values)) ** 2, 0) / (values.length - 1)));
const unique = (values) => [...new Set(values)];
const detailed = () => runs[state.run];
const shown = () => runs.filter((_, number) => !state.hidden.has(number));
const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

function groups() {
  const members = new Map();
  for (const run of shown()) members.set(run.group, [...(members.get(run.group) ?? []), run]);
  const names = unique(runs.map((run) => run.group));
  return [...members].map(([name, of]) => ({ name, members: of, number: names.indexOf(name) }));
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const color = (number) => css(`--c${number % 8}`);

// --- what plots have in common ----------------------------------------------------------------------------------------

function option(own) {
  const [ink, muted, line, card] = ["--ink", "--muted", "--line", "--card"].map(css);
  const axis = (one) => ({
    nameLocation: "middle", nameTextStyle: { color: muted },
    axisLabel: { color: muted, hideOverlap: true, ...one.axisLabel }, axisLine: { show: true, onZero: false, lineStyle: { color: muted } },
    splitLine: { lineStyle: { color: line } }, ...Object.fromEntries(Object.entries(one).filter(([key]) => key !== "axisLabel")),
  });
  const axes = (given) => (Array.isArray(given) ? given.map(axis) : axis(given));
  return {
    animation: false,
    textStyle: { color: ink, fontFamily: getComputedStyle(document.body).fontFamily },
    legend: { type: "scroll", top: 0, left: 0, right: 0, textStyle: { color: ink }, pageTextStyle: { color: ink }, pageIconColor: ink },
    toolbox: {
      top: 10, right: 0, itemSize: 14, iconStyle: { borderColor: muted },
      feature: { dataZoom: { title: { zoom: "Zoom", back: "Zoom back" } }, restore: { title: "Reset" }, saveAsImage: { title: "Save", backgroundColor: card } },
    },
    grid: { left: 12, right: 24, top: 54, bottom: 10 },
    dataZoom: [{ type: "inside", xAxisIndex: "all", filterMode: "none", zoomOnMouseWheel: "ctrl", moveOnMouseWheel: false, moveOnMouseMove: "ctrl" }],
    ...own,
    tooltip: { confine: true, backgroundColor: card, borderColor: line, textStyle: { color: ink }, ...own.tooltip },
    xAxis: axes(own.xAxis), yAxis: axes(own.yAxis),
  };
}

/** The ends of an axis with room around the values. */
function padded(values, isLog = false) {
  const ends = [Math.min(...values), Math.max(...values)].map((value) => (isLog ? Math.log(value) : value));
  const room = 0.12 * (ends[1] - ends[0]) || (isLog ? 0.5 : Math.abs(ends[0]) / 50 || 1);
  const [min, max] = [ends[0] - room, ends[1] + room].map((value) => (isLog ? Math.exp(value) : value));
  return { min, max };
}

const layerAxis = (layers) => ({ type: "category", data: layers, inverse: true, axisLabel: { width: 170, overflow: "truncate", interval: layers.length > 45 ? "auto" : 0, fontSize: 11 } });
const tip = (title, ...lines) => `<b>${escaped(title)}</b>` + lines.map((line) => `<br>${escaped(line)}`).join("");
const heightOf = (layers) => Math.min(Math.max(120 + 17 * layers.length, 260), 1400);

// --- the plots --------------------------------------------------------------------------------------------------------

const plots = {
  accuracy() {
    const series = [], rows = [];
    for (const { name, members, number } of groups()) {
      const at = new Map();
      for (const run of members)
        for (const row of run.history)
          if (isNumber(row.test_accuracy_percent)) at.set(row.epoch, [...(at.get(row.epoch) ?? []), row.test_accuracy_percent]);
      const epochs = [...at.keys()].sort((a, b) => a - b);
      const points = epochs.map((epoch) => ({ epoch, mean: mean(at.get(epoch)), band: deviation(at.get(epoch)), seeds: at.get(epoch).length }));
      rows.push(...points.map((one) => [name, one.epoch, one.mean, one.band, one.seeds]));
      series.push({
        name, type: "line", symbol: SYMBOLS[number % SYMBOLS.length], symbolSize: 6, color: color(number),
        lineStyle: { type: DASHES[Math.floor(number / 8) % 3] }, data: points.map((one) => [one.epoch, one.mean, one.band, one.seeds]),
        tooltip: { formatter: ({ data }) => tip(name, `epoch ${data[0]}: ${figure(data[1])} %`, data[3] > 1 ? `± ${figure(data[2])} over ${data[3]} seeds` : "one seed") },
      });
      if (members.length > 1)
        series.push({
          name, type: "custom", silent: true, z: 1, color: color(number), clip: true, encode: { x: 0, y: [1, 2] }, data: points.map((one) => [one.epoch, one.mean - one.band, one.mean + one.band]),
          renderItem: ({ dataIndex: i }, api) => {
            const [one, next] = [points[i], points[i + 1] ?? points[i]];
            const corners = [[one, -1], [one, 1], [next, 1], [next, -1]].map(([at, sign]) => api.coord([at.epoch, at.mean + sign * at.band]));
            return { type: "polygon", shape: { points: corners }, style: { fill: color(number), opacity: 0.18 } };
          },
        });
    }
    if (!rows.length) return null;
    return {
      option: option({
        tooltip: { trigger: "item" }, series,
        xAxis: { type: "value", name: "epoch", minInterval: 1, min: "dataMin", max: "dataMax" },
        yAxis: { type: "value", name: "test accuracy (%)", scale: true },
      }),
      header: ["run", "epoch", "mean accuracy (%)", "sample deviation", "seeds"], rows,
    };
  },

  pareto() {
    const cost = costs().find((one) => one.key === state.cost);
    if (!cost) return null;
    const points = groups().flatMap(({ name, members, number }) => {
      const [xs, ys] = [members.map(cost.of), members.map((run) => run.test_accuracy_percent)];
      return [...xs, ...ys].every(isNumber) ? [{ name, number, x: mean(xs), y: mean(ys), dx: deviation(xs), dy: deviation(ys), seeds: members.length }] : [];
    });
    if (!points.length) return null;
    const isLog = Math.max(...points.map((one) => one.x)) > 20 * Math.min(...points.map((one) => one.x));
    const beats = (a, b) => a.x <= b.x && a.y >= b.y && (a.x < b.x || a.y > b.y);
    const best = points.filter((one) => !points.some((other) => beats(other, one))).sort((a, b) => a.x - b.x);
    return {
      option: option({
        xAxis: { type: isLog ? "log" : "value", name: cost.title, axisLabel: { formatter: figure, showMinLabel: false, showMaxLabel: false }, ...padded(points.map((one) => one.x), isLog) },
        yAxis: { type: "value", name: "test accuracy (%)", ...padded(points.flatMap((one) => [one.y - one.dy, one.y + one.dy])), axisLabel: { formatter: figure } },
        series: [
          { type: "line", step: "end", symbol: "none", silent: true, color: css("--muted"), lineStyle: { width: 1, type: "dashed" }, data: best.map((one) => [one.x, one.y]) },
          {
            type: "custom", silent: true, data: points.map((one) => [one.x, one.y, one.dx, one.dy]), encode: { x: 0, y: 1 },
            renderItem: (_, api) => {
              const [x, y, dx, dy] = [0, 1, 2, 3].map((index) => api.value(index));
              const bar = (from, to) => { const [a, b] = [api.coord(from), api.coord(to)]; return { type: "line", shape: { x1: a[0], y1: a[1], x2: b[0], y2: b[1] }, style: { stroke: css("--muted") } }; };
              return { type: "group", children: [bar([x, y - dy], [x, y + dy]), bar([Math.max(x - dx, x / 2), y], [x + dx, y])] };
            },
          },
          ...points.map((one) => ({
            name: one.name, type: "scatter", symbol: SYMBOLS[one.number % SYMBOLS.length], symbolSize: 13, data: [[one.x, one.y]], color: color(one.number),
            itemStyle: { color: best.includes(one) ? color(one.number) : css("--card"), borderColor: color(one.number), borderWidth: 2 },
            tooltip: { formatter: () => tip(one.name, `${figure(one.y)} ± ${figure(one.dy)} %`, `${cost.title}: ${figure(one.x)}`, `${one.seeds} seed${one.seeds > 1 ? "s" : ""}`) },
          })),
        ],
      }),
      header: ["run", cost.title, "accuracy (%)", "sample deviation", "best"], rows: points.map((one) => [one.name, one.x, one.y, one.dy, best.includes(one) ? "yes" : "no"]),
    };
  },

  sizes() {
    const [part, by] = state.size.split(".");
    const of = (run, key) => Object.fromEntries(Object.entries(run[part][by]).map(([name, size]) => [name, size[key]]));
    const bars = shown().map((run) => ({ name: run.label, parts: of(run, "encoded_mib") }));
    if (detailed().emulated) bars.push({ name: "dense bfloat16", parts: of(detailed(), "bf16_mib") }, { name: "dense float32", parts: of(detailed(), "fp32_mib") });
    const parts = unique(bars.flatMap((bar) => Object.keys(bar.parts)));
    if (!parts.length) return null;
    const total = (bar) => Object.values(bar.parts).reduce((a, b) => a + b, 0);
    return {
      height: 110 + 38 * bars.length,
      option: option({
        tooltip: { trigger: "axis", axisPointer: { type: "shadow" }, valueFormatter: (value) => `${figure(value)} MiB` },
        xAxis: { type: "value", name: "MiB" }, yAxis: { type: "category", data: bars.map((bar) => bar.name), inverse: true, axisLabel: { width: 190, overflow: "truncate" } },
        series: parts.map((name, number) => ({ name: words(name), type: "bar", stack: "all", barMaxWidth: 26, color: color(ROLE_COLORS[name] ?? number), itemStyle: { borderColor: css("--card"), borderWidth: 0.5 }, data: bars.map((bar) => bar.parts[name] ?? 0) })),
      }),
      header: ["run", ...parts.map(words), "all (MiB)"], rows: bars.map((bar) => [bar.name, ...parts.map((name) => bar.parts[name] ?? 0), total(bar)]),
    };
  },

  heatmap() {
    const metric = metrics().find((one) => one.key === state.metric);
    if (!metric) return null;
    const { steps, series, every } = detailed().over_time;
    const of = series.filter((one) => one.role === metric.role && one[metric.value]);
    const layers = of.map((one) => one.layer);
    const cells = of.flatMap((one, y) => one[metric.value].map((value, x) => [x, y, isNumber(value) ? value * metric.factor : "-"]));
    const values = cells.map((cell) => cell[2]).filter(isNumber);
    if (!values.length) return null;
    let [low, high] = values.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
    if (low === high) [low, high] = [low - Math.abs(low) / 100 - 1e-9, high + Math.abs(high) / 100 + 1e-9];
    return {
      canvas: true, height: heightOf(layers), note: every > 1 ? `Every ${every}th of the recorded steps is drawn.` : "",
      click: ({ data }) => choose("layer", layers[data[1]]),
      option: option({
        legend: { show: false },
        grid: { left: 12, right: 90, top: 46, bottom: 10 },
        tooltip: { formatter: ({ data }) => tip(layers[data[1]], `step ${steps[data[0]] + 1}: ${figure(data[2])} ${metric.unit}`) },
        xAxis: { type: "category", data: steps.map((step) => step + 1), name: "step" }, yAxis: layerAxis(layers),
        visualMap: { min: low, max: high, calculable: true, right: 0, top: "middle", precision: 3, itemHeight: 150, textStyle: { color: css("--ink") }, inRange: { color: [css("--low"), css("--mid"), css("--high")] }, formatter: figure },
        series: [{ type: "heatmap", data: cells, progressive: 0, emphasis: { itemStyle: { borderColor: css("--ink"), borderWidth: 1 } } }],
      }),
      header: ["layer", ...steps.map((step) => `step ${step + 1}`)], rows: of.map((one) => [one.layer, ...one[metric.value].map((value) => (isNumber(value) ? value * metric.factor : null))]),
    };
  },

  codecs() {
    const records = detailed().tensors.filter((one) => one.role === state.codecRole && Object.keys(one.other_codecs_bits_per_element).length);
    if (!records.length) return null;
    const layers = unique(records.map((one) => one.layer));
    const others = unique(records.flatMap((one) => Object.keys(one.other_codecs_bits_per_element)));
    const marks = (name, symbol, of, style, number) => ({
      name, type: "scatter", symbol, symbolSize: 9, color: color(number), itemStyle: style,
      data: records.flatMap((one) => (of(one) > 0 ? [[of(one), one.layer]] : [])),
      tooltip: { formatter: ({ data }) => tip(data[1], `${name}: ${figure(data[0])} bits an element`) },
    });
    return {
      height: heightOf(layers) + 40,
      option: option({
        xAxis: { type: "log", logBase: 2, name: "bits an element (log scale)", axisLabel: { formatter: figure } }, yAxis: layerAxis(layers),
        series: [
          ...others.map((name, number) => marks(name, SYMBOLS[number % SYMBOLS.length], (one) => one.other_codecs_bits_per_element[name], { color: "transparent", borderColor: color(number + 2), borderWidth: 1.5 }, number + 2)),
          { ...marks("the run's codec", "circle", (one) => one.bits_per_element, {}, 1), symbolSize: 11 },
          { ...marks("tag entropy", "path://M-1,-6L1,-6L1,6L-1,6Z", (one) => one.tag_entropy_bits_per_element, { color: css("--ink") }, 6), symbolSize: [3, 15] },
          { ...marks("order-0 entropy", "path://M-1,-6L1,-6L1,6L-1,6Z", (one) => one.order0_entropy_bits_per_element, { color: css("--c3") }, 3), symbolSize: [3, 15] },
        ],
      }),
      header: ["layer", "codec", "bits an element", "tag entropy", "order-0 entropy", ...others],
      rows: records.map((one) => [one.layer, one.codec, one.bits_per_element, one.tag_entropy_bits_per_element, one.order0_entropy_bits_per_element, ...others.map((name) => one.other_codecs_bits_per_element[name])]),
    };
  },

  sparsity() {
    const rows = detailed().gradients.filter((row) => isNumber(row.asked_percent));
    if (!rows.length) return null;
    const layers = rows.map((row) => row.layer);
    const marks = (name, key, symbol, size, shade) => ({
      name, type: "scatter", symbol, symbolSize: size, color: shade, data: rows.flatMap((row) => (isNumber(row[key]) ? [[row[key], row.layer]] : [])),
      tooltip: { formatter: ({ data }) => tip(data[1], `${name}: ${figure(data[0])} %`) },
    });
    return {
      height: heightOf(layers) + 40,
      option: option({
        xAxis: { type: "value", name: "zeros in the neural gradient (%)", min: 0, max: 100 }, yAxis: layerAxis(layers),
        series: [
          { name: "achieved", type: "bar", color: color(5), barMaxWidth: 14, data: rows.map((row) => row.achieved_percent), tooltip: { formatter: ({ dataIndex }) => tip(layers[dataIndex], `achieved ${figure(rows[dataIndex].achieved_percent)} ± ${figure(rows[dataIndex].achieved_std_points)} %`) } },
          { name: "± deviation over steps", type: "custom", color: css("--ink"), silent: true, encode: { x: [0, 1], y: 2 }, data: rows.map((row) => [row.achieved_percent - row.achieved_std_points, row.achieved_percent + row.achieved_std_points, row.layer]),
            renderItem: (_, api) => { const [a, b] = [api.coord([api.value(0), api.value(2)]), api.coord([api.value(1), api.value(2)])]; return { type: "line", shape: { x1: a[0], y1: a[1], x2: b[0], y2: b[1] }, style: { stroke: css("--ink") } }; } },
          marks("asked", "asked_percent", "path://M-1,-6L1,-6L1,6L-1,6Z", [3, 16], css("--ink")),
          marks("the lognormal rule's", "lognormal_percent", "diamond", 10, color(1)),
        ],
      }),
      header: ["layer", "asked (%)", "achieved (%)", "deviation", "lognormal rule (%)"], rows: rows.map((row) => [row.layer, row.asked_percent, row.achieved_percent, row.achieved_std_points, row.lognormal_percent]),
    };
  },

  weights() {
    const pruned = shown().filter((run) => run.weight_pruning?.history.length);
    if (!pruned.length) return null;
    return {
      option: option({
        tooltip: { trigger: "axis", valueFormatter: (value) => `${figure(value)} %` },
        xAxis: { type: "value", name: "step", min: 0, max: "dataMax" }, yAxis: { type: "value", name: "zero weights (%)", min: 0, max: 100 },
        series: pruned.map((run) => {
          const points = run.weight_pruning.history.map((row) => [row.step, 100 * row.sparsity]);
          return { name: run.label, type: "line", step: "end", symbol: "circle", symbolSize: 4, color: color(runs.indexOf(run)), data: [[0, 0], ...points, [run.steps, points.at(-1)[1]]] };
        }),
      }),
      header: ["run", "step", "zeros (%)", "pruned", "returned"], rows: pruned.flatMap((run) => run.weight_pruning.history.map((row) => [run.label, row.step, 100 * row.sparsity, row.pruned, row.returned])),
    };
  },

  snr() {
    const pruning = detailed().weight_pruning;
    if (!pruning?.log2_snr) return null;
    const { lowest, counts } = pruning.log2_snr;
    const names = counts.map((_, number) => `2^${lowest + number}`);
    const edge = Math.log2(pruning.threshold);
    return {
      option: option({
        legend: { show: false },
        tooltip: { formatter: ({ dataIndex }) => tip(`${names[dataIndex]} to 2^${lowest + dataIndex + 1}`, `${counts[dataIndex].toLocaleString("en")} weights`) },
        xAxis: { type: "category", data: names, name: "signal-to-noise ratio of the gradient" }, yAxis: { type: "value", name: "weights" },
        series: [{ type: "bar", data: counts.map((value, number) => ({ value, itemStyle: { color: lowest + number < edge ? color(1) : color(0) } })), barCategoryGap: "8%",
          markLine: { symbol: "none", silent: true, lineStyle: { color: css("--ink") }, label: { color: css("--ink"), formatter: `threshold ${figure(pruning.threshold)}` }, data: [{ xAxis: Math.min(Math.max(edge - lowest - 0.5, 0), counts.length - 1) }] } }],
      }),
      header: ["from", "weights"], rows: names.map((name, number) => [name, counts[number]]),
    };
  },

  machines() {
    const able = (detailed().machines ?? []).filter((one) => Object.keys(one.totals).length);
    if (!able.length) return null;
    const parts = `${state.what}_by_${state.what === "seconds" ? "bound" : "part"}`;
    const bars = able.flatMap((one) => {
      const base = (one.totals.fp32 ?? one.totals.encoded)[state.what];
      return Object.entries(one.totals).map(([scheme, total]) => ({ machine: one.machine, name: `${one.machine}, ${scheme}`, total: total[state.what], share: total[state.what] / base, shares: Object.fromEntries(Object.entries(total[parts]).map(([name, value]) => [name, value / base])) }));
    });
    const names = unique(bars.flatMap((bar) => Object.keys(bar.shares)));
    const unit = state.what === "seconds" ? "ms" : "mJ";
    return {
      height: 120 + 28 * bars.length, click: ({ dataIndex }) => choose("machine", bars[dataIndex].machine),
      option: option({
        tooltip: { trigger: "axis", axisPointer: { type: "shadow" }, formatter: (items) => { const bar = bars[items[0].dataIndex]; return tip(bar.name, `${figure(1e3 * bar.total)} ${unit}, ${figure(bar.share)} of the baseline`, ...Object.entries(bar.shares).map(([name, share]) => `${name}: ${figure(share)}`)); } },
        xAxis: { type: "value", name: `${state.what === "seconds" ? "time" : "energy"} of a step over dense float32's` },
        yAxis: { type: "category", data: bars.map((bar) => bar.name), inverse: true, axisLabel: { width: 190, overflow: "truncate" } },
        series: names.map((name, number) => ({ name, type: "bar", stack: "all", barMaxWidth: 20, color: color(number), itemStyle: { borderColor: css("--card"), borderWidth: 0.5 }, data: bars.map((bar) => bar.shares[name] ?? 0) })),
      }),
      header: ["machine", `all (${unit})`, "of the baseline", ...names], rows: bars.map((bar) => [bar.name, 1e3 * bar.total, bar.share, ...names.map((name) => bar.shares[name] ?? 0)]),
    };
  },

  roofline() {
    const on = (detailed().machines ?? []).find((one) => one.machine === state.machine);
    if (!on?.rows.length) return null;
    const points = on.rows.map(([layer, pass, scheme, bound, x, y, peak]) => ({ layer, pass, scheme, bound, x, y, peak }));
    const bandwidth = on.main_memory_bytes_per_second;
    const [low, high] = [0.5 * Math.min(...points.map((one) => one.x)), 2 * Math.max(...points.map((one) => one.x))];
    const roofs = unique(points.map((one) => one.scheme)).flatMap((scheme) => unique(points.filter((one) => one.scheme === scheme).map((one) => one.peak)).map((peak) => {
      const edges = [low, Math.min(Math.max(peak / bandwidth, low), high), high];
      return { name: scheme, type: "line", symbol: "none", silent: true, color: color(SCHEME_COLORS[scheme]), lineStyle: { width: 1.2 }, tooltip: { show: false }, data: edges.map((edge) => [edge, Math.min(peak, edge * bandwidth)]) };
    }));
    const series = unique(points.map((one) => one.scheme)).flatMap((scheme) => Object.entries(PASSES).map(([pass, symbol]) => ({
      name: scheme, type: "scatter", symbol, symbolSize: 8, color: color(SCHEME_COLORS[scheme]), itemStyle: { opacity: 0.8 },
      data: points.filter((one) => one.scheme === scheme && one.pass === pass).map((one) => ({ value: [one.x, one.y], one })),
      tooltip: { formatter: ({ data: { one } }) => tip(`${one.layer}, ${one.pass}`, one.scheme, `${figure(one.x)} MACs a byte`, `${figure(one.y / 1e9)} GMAC/s of ${figure(Math.min(one.peak, one.x * bandwidth) / 1e9)}`, `bound by ${one.bound}`) },
    })));
    const giga = (value) => figure(value / 1e9);
    return {
      note: "Circle: forward; square: dgrad; triangle: wgrad.",
      option: option({
        xAxis: { type: "log", name: `MACs per byte of ${on.main_memory}`, min: low, max: high, axisLabel: { formatter: figure, showMinLabel: false, showMaxLabel: false } },
        yAxis: { type: "log", name: "GMAC a second", axisLabel: { formatter: giga } }, series: [...roofs, ...series],
      }),
      header: ["layer", "pass", "scheme", "MACs a byte", "GMAC/s", "peak GMAC/s", "bound by"], rows: points.map((one) => [one.layer, one.pass, one.scheme, one.x, one.y / 1e9, one.peak / 1e9, one.bound]),
    };
  },

  line() {
    const found = distribution();
    if (!found?.sample) return null;
    const { lowest, highest, counts } = found.sample.log2_histogram;
    const width = (highest - lowest) / counts.length;
    const fmt = found.format ? detailed().formats[found.format] : null;
    const largest = 2 ** highest;
    const scale = found.scale ?? (fmt ? largest / fmt.max : 1);
    const ticks = (fmt?.positive_numbers ?? []).map((value) => ({ value, at: Math.log2(value * scale) }));
    const ends = fmt ? [Math.log2(fmt.min_subnormal * scale), Math.log2(fmt.max * scale)] : [];
    const [from, to] = [Math.min(lowest, ...ends.filter((end) => end > lowest - 40)) - 1, Math.max(highest, ...ends.filter((end) => end < highest + 40)) + 1];
    const line = (at, name, shade, position) => (isNumber(at) && at >= from && at <= to ? [{ xAxis: at, lineStyle: { color: shade }, label: { formatter: name, color: shade, position } }] : []);
    const marked = fmt ? [...line(ends[0], "smallest", css("--muted"), "insideEndTop"), ...line(Math.log2(fmt.min_normal * scale), "smallest normal", css("--c4"), "insideEndTop"), ...line(ends[1], "largest", css("--c1"), "insideEndTop")] : [];
    const alpha = found.alpha ? line(Math.log2(found.alpha), "±alpha", css("--c3"), "insideEndTop") : [];
    const total = found.sample.count;
    const outside = fmt ? [...(ends[0] - 1 > from ? [[{ xAxis: from }, { xAxis: ends[0] - 1 }]] : []), ...(ends[1] < to ? [[{ xAxis: ends[1] }, { xAxis: to }]] : [])] : [];
    const tick = (keep, shade, name) => ({ name, type: "scatter", xAxisIndex: 1, yAxisIndex: 1, symbol: "rect", symbolSize: [1.5, 18], color: shade, data: ticks.filter(keep).map((one) => [one.at, 0, one.value]), tooltip: { formatter: ({ data }) => tip(figure(data[2]), `times the scale: ${figure(data[2] * scale)}`) } });
    const axis = { type: "value", min: from, max: to, axisLabel: { formatter: figure, showMinLabel: false, showMaxLabel: false } };
    const words_ = !fmt ? "float32: its numbers are too dense to draw." : `${found.format}${fmt.block_size ? `: blocks of ${fmt.block_size} have scales of their own; drawn with the scale at which the largest magnitude just fits` : `, scale ${power(scale)}${found.scales > 1 ? ` (the median of ${found.scales})` : ""}`}${ticks.length ? "" : `; ${fmt.bits} bits are too many numbers to draw`}.`;
    return {
      note: `${words_} ${figure(found.elements)} elements, ${figure((100 * found.zeros) / found.elements)} % zeros.`,
      option: option({
        grid: [{ left: 60, right: 24, top: 54, bottom: 92, outerBoundsMode: "none" }, { left: 60, right: 24, height: 30, bottom: 48, outerBoundsMode: "none" }],
        xAxis: [{ ...axis, axisLabel: { show: false } }, { ...axis, gridIndex: 1, name: "log2 of the magnitude", nameGap: 26, splitLine: { show: false } }],
        yAxis: [{ type: "value", name: "share of the nonzeros (%)" }, { type: "value", gridIndex: 1, min: -1, max: 1, show: false }],
        dataZoom: [{ type: "inside", xAxisIndex: [0, 1], filterMode: "none", zoomOnMouseWheel: "ctrl", moveOnMouseWheel: false, moveOnMouseMove: "ctrl" }],
        series: [
          {
            name: "histogram", type: "custom", color: color(0), encode: { x: 0, y: 1 }, data: counts.map((count, number) => [lowest + (number + 0.5) * width, (100 * count) / total]),
            renderItem: (_, api) => { const [x, y] = api.coord([api.value(0), api.value(1)]); const [, base] = api.coord([api.value(0), 0]); const w = api.size([width, 0])[0]; return { type: "rect", shape: { x: x - w / 2, y, width: Math.max(w - 0.5, 0.5), height: base - y }, style: { fill: color(0), opacity: 0.75 } }; },
            tooltip: { formatter: ({ data }) => tip(`2^${figure(data[0])}`, `${figure(data[1])} % of the nonzeros`) },
            markLine: { symbol: "none", silent: true, label: { fontSize: 11 }, data: [...marked, ...alpha] },
            markArea: { silent: true, itemStyle: { color: css("--c1"), opacity: 0.09 }, data: outside },
          },
          tick((one) => one.value >= fmt.min_normal, css("--ink"), "normal numbers"), tick((one) => one.value < fmt.min_normal, css("--c4"), "subnormal numbers"),
        ],
      }),
      header: ["log2 of the magnitude", "share of the nonzeros (%)"], rows: counts.map((count, number) => [lowest + (number + 0.5) * width, (100 * count) / total]),
    };
  },

  density() {
    const sample = distribution()?.sample;
    if (!sample) return null;
    const { lowest, highest, counts } = sample.log2_histogram;
    const width = (highest - lowest) / counts.length;
    const at = counts.map((_, number) => lowest + (number + 0.5) * width);
    const gauss = (x, center, sigma) => Math.exp(-(((x - center) / sigma) ** 2) / 2) / (sigma * Math.sqrt(2 * Math.PI));
    const curves = {
      "the nonzeros": at.map((_, number) => counts[number] / sample.count / width),
      "fitted lognormal": at.map((x) => gauss(x, sample.mean_log2, sample.std_log2)),
      "fitted normal": at.map((x) => (gauss(2 ** x, sample.mean, sample.std) + gauss(-(2 ** x), sample.mean, sample.std)) * 2 ** x * Math.LN2),
    };
    return {
      option: option({
        tooltip: { trigger: "axis", valueFormatter: figure },
        xAxis: { type: "value", name: "log2|x|", min: lowest, max: highest, axisLabel: { formatter: figure, showMinLabel: false, showMaxLabel: false } }, yAxis: { type: "value", name: "density" },
        series: Object.entries(curves).map(([name, values], number) => ({ name, type: "line", symbol: "none", step: number ? false : "middle", color: [color(0), css("--ink"), color(3)][number], lineStyle: { type: number === 2 ? "dashed" : "solid", width: number ? 1.6 : 1 }, areaStyle: number ? undefined : { opacity: 0.35 }, data: at.map((x, index) => [x, values[index]]) })),
      }),
      header: ["log2|x|", ...Object.keys(curves)], rows: at.map((x, index) => [x, ...Object.values(curves).map((values) => values[index])]),
    };
  },

  qq() {
    const found = distribution();
    if (!found?.sample) return null;
    const { sigmas, quantiles, log2_quantiles: logs } = found.sample;
    const told = found.statistics;
    const D = told ? `Kolmogorov-Smirnov D: ${Object.entries(told).filter(([, d]) => isNumber(d)).sort((a, b) => a[1] - b[1]).map(([name, d]) => `${name} ${figure(d)}`).join(", ")}.` : "";
    const marks = (name, values, symbol, number) => ({ name, type: "scatter", symbol, symbolSize: 7, color: color(number), data: sigmas.map((sigma, index) => [sigma, values[index]]), tooltip: { formatter: ({ data }) => tip(name, `${figure(data[0])} σ of the fitted, ${figure(data[1])} σ of the sample`) } });
    return {
      note: D,
      option: option({
        xAxis: { type: "value", name: "quantiles of the fitted distribution (σ)", min: -3.6, max: 3.6 }, yAxis: { type: "value", name: "of the sample (σ)", scale: true },
        series: [
          { type: "line", symbol: "none", silent: true, color: css("--muted"), lineStyle: { width: 1 }, data: [[-3.4, -3.4], [3.4, 3.4]] },
          marks("log2|x| against a normal: lognormal?", logs, "circle", 0), marks("x against a normal: normal?", quantiles, "triangle", 3),
        ],
      }),
      header: ["sigma", "log2|x|", "x"], rows: sigmas.map((sigma, index) => [sigma, logs[index], quantiles[index]]),
    };
  },
};

// --- what can be chosen -----------------------------------------------------------------------------------------------

function costs() {
  const machines = unique(runs.flatMap((run) => (run.machines ?? []).map((one) => one.machine)));
  const on = (machine, what) => (run) => { const value = (run.machines ?? []).find((one) => one.machine === machine)?.totals.encoded?.[what]; return isNumber(value) ? 1e3 * value : null; };
  return [
    { key: "traffic", title: "traffic of a step (MiB)", of: (run) => run.traffic.total.encoded_mib },
    { key: "footprint", title: "peak footprint (MiB)", of: (run) => run.footprint.total.encoded_mib },
    { key: "bits", title: "bits a gradient element", of: (run) => run.gradient_bits },
    ...machines.flatMap((machine) => [
      { key: `time ${machine}`, title: `ms a step on ${machine}`, of: on(machine, "seconds") },
      { key: `energy ${machine}`, title: `mJ a step on ${machine}`, of: on(machine, "joules") },
    ]),
  ].filter((cost) => runs.some((run) => isNumber(cost.of(run)) && cost.of(run) > 0));
}

function metrics() {
  const series = detailed().over_time?.series ?? [];
  const all = ["gradient", "activation", "weight"].flatMap((role) => [
    { key: `${role} sparsity`, role, value: "sparsity", factor: 100, unit: "%" },
    { key: `${role} bits an element`, role, value: "bits_per_element", factor: 1, unit: "bits" },
  ]);
  all.splice(1, 0, { key: "gradient cosine", role: "gradient", value: "cosine", factor: 1, unit: "cosine" });
  return all.filter((metric) => series.some((one) => one.role === metric.role && one[metric.value]));
}

const distributions = () => detailed().distributions ?? [];
const distribution = () => distributions().find((one) => one.layer === state.layer && one.role === state.tensor);
const SIZES = [["traffic.by_role", "traffic of a step, by role"], ["traffic.by_pass", "traffic of a step, by pass"], ["footprint.by_role", "peak footprint, by role"]];

/** What each select offers, as [value, title], under the present state. */
const choices = {
  run: () => runs.map((run, number) => [String(number), run.label]),
  cost: () => costs().map((one) => [one.key, one.title]),
  size: () => SIZES,
  metric: () => metrics().map((one) => [one.key, one.key]),
  "codec-role": () => unique(detailed().tensors.filter((one) => Object.keys(one.other_codecs_bits_per_element).length).map((one) => one.role)).sort((a, b) => ROLES.indexOf(b) - ROLES.indexOf(a)).map((role) => [role, words(role)]),
  "machine-what": () => [["seconds", "time"], ["joules", "energy"]],
  machine: () => (detailed().machines ?? []).filter((one) => one.rows.length).map((one) => [one.machine, one.machine]),
  layer: () => unique(distributions().map((one) => one.layer)).map((layer) => [layer, layer]),
  tensor: () => ["gradient", "activation", "weight", "weight_gradient"].filter((role) => distributions().some((one) => one.role === role && one.layer === state.layer)).map((role) => [role, words(role)]),
};
const FIELDS = { "codec-role": "codecRole", "machine-what": "what" };
const DRAWN_BY = { // which plots follow a choice; all others follow the run alone
  cost: ["pareto"], size: ["sizes"], metric: ["heatmap"], "codec-role": ["codecs"], "machine-what": ["machines"], machine: ["roofline"],
  layer: ["line", "density", "qq"], tensor: ["line", "density", "qq"],
};

function offer(name) {
  const select = element(name), field = FIELDS[name] ?? name, offered = choices[name]();
  select.replaceChildren(...offered.map(([value, title]) => new Option(title, value)));
  const values = offered.map(([value]) => value);
  const wanted = String(state[field]);
  const chosen = values.includes(wanted) ? wanted : name === "layer" ? values[Math.floor(values.length / 2)] : values[0];
  state[field] = name === "run" ? Number(chosen) : (chosen ?? null);
  select.value = chosen ?? "";
}

function choose(name, value) {
  const field = FIELDS[name] ?? name;
  state[field] = name === "run" ? Number(value) : value;
  element(name).value = value;
  if (name === "run") {
    for (const other of Object.keys(choices)) if (other !== "run") offer(other);
    showRun();
    drawSoon(Object.keys(plots));
  } else {
    if (name === "layer") offer("tensor");
    drawSoon(DRAWN_BY[name]);
  }
}

function showRun() {
  for (const part of document.querySelectorAll(".of-run")) part.hidden = Number(part.dataset.run) !== state.run;
}

// --- drawing ----------------------------------------------------------------------------------------------------------

const PRINTED = 640; // pixels, of a plot on paper
const charts = {}, stale = new Set(), visible = new Set();

function drawSoon(names) {
  for (const name of names) {
    stale.add(name);
    const found = plots[name]();
    element(`figure-${name}`).hidden = found === null;
    if (found === null) stale.delete(name);
    else if (found.height) element(`plot-${name}`).style.height = `${found.height}px`;
    if (visible.has(name)) draw(name, found);
  }
  for (const part of document.querySelectorAll(".part")) {
    part.hidden = [...part.querySelectorAll("figure")].every((figure) => figure.hidden);
    document.querySelector(`nav a[href="#${part.querySelector("h2").id}"]`).hidden = part.hidden;
  }
}

function draw(name, found = plots[name]()) {
  if (!stale.delete(name) || found === null) return;
  const place = element(`plot-${name}`);
  const chart = (charts[name] ??= echarts.init(place, null, { renderer: found.canvas ? "canvas" : "svg" }));
  chart.resize();
  const isNarrow = place.clientWidth < 480;
  chart.setOption(isNarrow ? { ...found.option, toolbox: { show: false } } : found.option, { notMerge: true });
  chart.off("click");
  if (found.click) chart.on("click", found.click);
  element(`note-${name}`).textContent = found.note ?? "";
  const values = element(`values-${name}`);
  if (values.open) tabulate(name, found);
  values.ontoggle = () => tabulate(name, values.open ? plots[name]() : { header: [], rows: [] });
}

function tabulate(name, { header, rows }) {
  const table = document.createElement("table");
  const head = table.createTHead().insertRow();
  for (const title of header) head.append(Object.assign(document.createElement("th"), { scope: "col", textContent: title }));
  const body = table.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    row.forEach((cell, number) => {
      const place = number ? line.insertCell() : line.appendChild(Object.assign(document.createElement("th"), { scope: "row" }));
      place.textContent = isNumber(cell) ? figure(cell) : (cell ?? "–");
    });
  }
  document.querySelector(`#values-${name} .scroll`).replaceChildren(table);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  drawSoon(Object.keys(plots));
}

function begin() {
  element("controls").hidden = false;
  state.run = Math.max(runs.findIndex((run) => run.emulated), 0);
  const names = unique(runs.map((run) => run.group));
  runs.forEach((run, number) => {
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: true, id: `shown-${number}` });
    box.addEventListener("change", () => {
      box.checked ? state.hidden.delete(number) : state.hidden.add(number);
      drawSoon(["accuracy", "pareto", "sizes", "weights"]);
    });
    const swatch = Object.assign(document.createElement("span"), { className: "swatch" });
    swatch.style.background = `var(--c${names.indexOf(run.group) % 8})`;
    const label = document.createElement("label");
    label.append(box, swatch, run.label);
    element("runs").append(label);
  });
  for (const name of Object.keys(choices)) {
    offer(name);
    element(name).addEventListener("change", () => choose(name, element(name).value));
  }
  showRun();
  element("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
  for (const button of document.querySelectorAll(".copy")) {
    button.hidden = !navigator.clipboard;
    button.addEventListener("click", () => navigator.clipboard.writeText(element(button.dataset.of).textContent));
  }
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const name = target.id.replace("figure-", "");
      isIntersecting ? visible.add(name) : visible.delete(name);
      if (isIntersecting) draw(name);
    }
  }, { rootMargin: "400px" });
  drawSoon(Object.keys(plots));
  for (const name of Object.keys(plots)) watcher.observe(element(`figure-${name}`));
  const sizes = new ResizeObserver((entries) => entries.forEach(({ target }) => charts[target.id.replace("plot-", "")]?.resize()));
  for (const name of Object.keys(plots)) sizes.observe(element(`plot-${name}`));
  let before = null;
  addEventListener("beforeprint", () => {
    before = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
    for (const name of Object.keys(plots)) {
      stale.add(name);
      draw(name);
      charts[name]?.resize({ width: PRINTED });
      charts[name]?.getZr().flush(); // now, not in the next frame
      const place = element(`plot-${name}`);
      if (place.querySelector("canvas")) place.append(Object.assign(charts[name].renderToCanvas({ pixelRatio: 2 }), { className: "printed" })); // whole, not frame by frame
    }
  });
  addEventListener("afterprint", () => {
    for (const copy of document.querySelectorAll("canvas.printed")) copy.remove();
    for (const chart of Object.values(charts)) chart.resize({ width: "auto" });
    setTheme(before);
  });
}

begin();
