// The interactive figure: any two columns of results.csv, by arm, with every run's numbers.
const number = (value) =>
  typeof value === "number" ? String(Number(value.toPrecision(6))) : value ?? "–";

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// Rows as objects; those of one group differ only in their seeds.
function rowsOf(data) {
  return data.arm.map((arm, place) => ({
    place,
    arm: data.arms[arm].name,
    point: data.columns.point[place],
    group: data.group[place],
  }));
}

// Mean over the seeds of a row's group, with its 95% t interval.
function overSeeds(data, rows, row, column) {
  const values = rows
    .filter((one) => one.group === row.group)
    .map((one) => data.columns[column][one.place])
    .filter((value) => typeof value === "number");
  if (!values.length) return "–";
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  if (values.length < 2) return `${number(mean)} (one seed, no interval)`;
  const squares = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  const error = Math.sqrt(squares / (values.length - 1) / values.length);
  const half = data.quantiles[Math.min(values.length, data.quantiles.length - 1)] * error;
  return `${number(mean)} (${number(mean - half)} to ${number(mean + half)}), ${values.length} seeds`;
}

function describe(data, rows, row, columns) {
  const lines = { Run: row.point, Arm: row.arm };
  for (const name of ["step", "projected", ...data.settings]) {
    const value = data.columns[name]?.[row.place];
    if (value !== null && value !== undefined) lines[name] = number(value);
  }
  for (const column of new Set(columns)) {
    const error = data.columns[`${column}_sem`]?.[row.place];
    const value = number(data.columns[column][row.place]);
    lines[column] = typeof error === "number" ? `${value} ± ${number(error)} (SEM)` : value;
    lines[`${column}, mean over seeds (95% interval)`] = overSeeds(data, rows, row, column);
  }
  lines.Command = `${data.command} --points=${data.quoted[row.place]}`;
  return lines;
}

function show(panel, lines) {
  const list = element("dl", "");
  for (const [name, value] of Object.entries(lines)) {
    const told = element("dd", "");
    told.append(element(name === "Command" ? "code" : "span", value));
    list.append(element("dt", name), told);
  }
  panel.replaceChildren(list);
}

function axis(data, column, log, values) {
  const numeric = values.every((value) => typeof value === "number");
  const positive = numeric && values.every((value) => value > 0);
  const scale = log && positive ? { type: "log", nice: false, padding: 15 } : { zero: false, padding: 15 };
  return {
    field: column,
    type: numeric ? "quantitative" : "nominal",
    title: column + (log && positive ? ", log scale" : ""),
    ...(numeric ? { scale } : {}),
    axis: numeric ? { tickCount: 6, format: log ? "~g" : undefined } : {},
  };
}

function start(root, data) {
  const form = root.querySelector("form");
  const panel = root.querySelector(".run");
  const fieldset = root.querySelector("fieldset");
  const rows = rowsOf(data);
  const names = Object.keys(data.columns);
  for (const side of ["x", "y"]) {
    form[side].append(...names.map((name) => element("option", name, { value: name })));
    form[side].value = data[side];
  }
  form["x-log"].checked = data.x.includes("trace");
  form.pair.append(
    element("option", "every matched pair", { value: "matched" }),
    ...data.pairs.map((pair, place) => element("option", pair.name, { value: place })),
  );
  form.run.append(
    ...rows.map((row) => {
      const step = data.columns.step?.[row.place];
      return element("option", `${row.point}, step ${step}`, { value: row.place });
    }),
  );
  for (const [place, arm] of data.arms.entries()) {
    const label = element("label", "");
    const box = element("input", "", { type: "checkbox", name: "arm", value: place, checked: "" });
    const swatch = element("span", "", { class: "swatch", style: `background: ${arm.color}` });
    label.append(box, swatch, arm.name);
    fieldset.append(label);
  }
  const shownPairs = () => {
    if (form.pair.value === "") return null;
    return form.pair.value === "matched" ? data.pairs : [data.pairs[form.pair.value]];
  };

  async function draw() {
    const columns = [form.x.value, form.y.value];
    const boxes = [...fieldset.querySelectorAll("input")];
    const arms = new Set(boxes.filter((box) => box.checked).map((box) => data.arms[box.value].name));
    const pairs = shownPairs();
    const points = pairs && new Set(pairs.flatMap((pair) => pair.points));
    const values = rows
      .filter((row) => arms.has(row.arm) && (!points || points.has(row.point)))
      .map((row) => ({
        ...row,
        ...Object.fromEntries(columns.map((name, side) => [`c${side}`, data.columns[name][row.place]])),
      }))
      .filter((row) => row.c0 !== null && row.c1 !== null);
    root.dataset.count = values.length;
    const encoded = ["x", "y"].map((side, place) => ({
      ...axis(data, columns[place], form[`${side}-log`].checked, values.map((row) => row[`c${place}`])),
      field: `c${place}`,
    }));
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const ink = dark ? "#e4e7ea" : "#1b1f24";
    const spec = {
      width: "container",
      height: 340,
      background: "transparent",
      data: { values },
      mark: { type: "point", filled: true, size: 70, opacity: 0.8 },
      encoding: {
        x: encoded[0],
        y: encoded[1],
        color: {
          field: "arm",
          type: "nominal",
          legend: null,
          scale: { domain: data.arms.map((arm) => arm.name), range: data.arms.map((arm) => arm.color) },
        },
        shape: { field: "arm", type: "nominal", legend: null },
      },
      config: {
        view: { stroke: null },
        axis: { labelColor: ink, titleColor: ink, gridOpacity: 0.3, domainColor: ink, titleLimit: 420 },
      },
    };
    const { view } = await window.vegaEmbed(root.querySelector(".plot"), spec, {
      actions: false,
      renderer: "svg",
    });
    view.addEventListener("mouseover", (event, item) => select(item));
    view.addEventListener("click", (event, item) => select(item));
    const select = (item) => {
      if (item?.datum?.point === undefined) return;
      form.run.value = item.datum.place;
      show(panel, describe(data, rows, rows[item.datum.place], columns));
    };
    if (form.run.value !== "") show(panel, describe(data, rows, rows[form.run.value], columns));
    root.dataset.drawn = "yes";
  }

  form.addEventListener("change", draw);
  form.addEventListener("submit", (event) => event.preventDefault());
  root.hidden = false;
  return draw();
}

for (const source of document.querySelectorAll("script.data")) {
  start(document.getElementById(source.dataset.for), JSON.parse(source.textContent));
}

// Print every folded part, then fold it again.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((part) => (part.open = true));
});
addEventListener("afterprint", () => folded.forEach((part) => (part.open = false)));
