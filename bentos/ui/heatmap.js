// The similarity matrix: a table that is a grid for the keyboard, its legend, and the line that reads a cell out.

import { makeScale } from "./colours.js";
import { formatValue, make, nameText } from "./dom.js";

const MAX_CELLS = 20_000; // beyond, a table is too much for the browser; the list of pairs says the same
const PADDING = 3; // of the box, which leaves room for the ring around a focused cell
const CELL = { least: 8, touch: 12, most: 54, numbers: 33 }; // pixels; `touch`: the least where there are no labels
const LABELS = { narrow: 30, wide: 400, from: 440, share: 0.4, manyShare: 0.28 }; // row labels; `from`: room for texts
const MANY = 20; // columns that need the room more than the labels do
const LETTER = 7.5; // about the width of one
const COLUMN_TEXTS_FROM = 24; // a cell at least this wide carries the column's text, upright

export class HeatMap {
  /** `box`, `readout`, `legend`: where to draw. */
  constructor({ box, readout, legend }) {
    this.box = box;
    this.readout = readout;
    this.legend = legend;
    this.cells = new Map();
    box.addEventListener("pointerover", (event) => this.#point(event.target, false));
    box.addEventListener("pointerleave", () => this.#restore());
    box.addEventListener("focusin", (event) => this.#point(event.target, true));
    box.addEventListener("click", (event) => this.#point(event.target, true));
    box.addEventListener("keydown", (event) => this.#move(event));
    new ResizeObserver(() => this.#fit()).observe(box);
  }

  /**
   * Show `comparison`: its `value` ("cosine" or "score"), rows and columns in `order` (null: as given), colours over
   * the whole scale or (`fit`) over the values found, the pair `pinned` read out. Beyond MAX_CELLS nothing is drawn.
   */
  show(comparison, { value, order, fit, pinned }) {
    this.comparison = comparison;
    this.values = value === "score" ? comparison.scores : comparison.cosines;
    this.value = value;
    this.rows = order ?? comparison.a.map((_, at) => at);
    this.columns = order ?? comparison.b.map((_, at) => at);
    this.pinned = pinned;
    this.longest = Math.max(...[...comparison.a, ...comparison.b].map((text) => text.length));
    this.scale = this.#makeScale(fit);
    if (comparison.a.length * comparison.b.length > MAX_CELLS) {
      this.table = null;
      this.readout.replaceChildren();
      this.legend.replaceChildren();
      this.box.replaceChildren(
        `${comparison.a.length} × ${comparison.b.length} cells are too many to draw; the nearest pairs are listed.`,
      );
      return;
    }
    this.#drawTable();
    this.#drawLegend();
    this.#fit();
    this.#restore();
  }

  /** Pin a pair, as a click on its cell does. */
  pin(row, column) {
    this.pinned = [row, column];
    this.#restore();
  }

  colourOf(row, column) {
    return this.scale.colour(this.values[row][column], this.isWarm(row, column)).background;
  }

  isWarm(row, column) {
    const { cosines, threshold } = this.comparison;
    return threshold !== null && cosines[row][column] >= threshold;
  }

  #isSelf(row, column) {
    return !this.comparison.two && row === column;
  }

  #makeScale(fit) {
    const { cosines, threshold, two } = this.comparison;
    const found = [];
    this.values.forEach((values, row) =>
      values.forEach((value, column) => {
        if (two || row !== column) found.push({ value, cosine: cosines[row][column] });
      }),
    );
    found.sort((one, other) => one.cosine - other.cosine);
    if (found.length === 0) return makeScale({ low: 0, high: 1, threshold: null });
    let [low, high] = fit ? [found[0].value, found.at(-1).value] : [0, 1];
    if (threshold === null) return makeScale({ low, high, threshold });
    // On the scale of the scores the threshold lies between the two values around it.
    const above = found.findIndex(({ cosine }) => cosine >= threshold);
    let cut = threshold;
    if (this.value === "score") {
      const [next, last] = [found.at(above), found.at(above - 1)];
      if (above === -1) cut = 1;
      else if (above === 0) cut = 0;
      else {
        const share = (threshold - last.cosine) / (next.cosine - last.cosine || 1);
        cut = last.value + share * (next.value - last.value);
      }
    }
    if (fit) [low, high] = [Math.min(low, cut), Math.max(high, cut)];
    return makeScale({ low, high, threshold: cut });
  }

  #drawTable() {
    const { a, b, two, threshold } = this.comparison;
    const head = make("tr", {}, make("td", { class: "corner" }));
    for (const column of this.columns) {
      const name = nameText(two, "b", column);
      head.append(
        make(
          "th",
          { scope: "col", title: b[column], "data-column": column },
          make("span", { class: "name" }, name),
          make("span", { class: "text" }, b[column]),
        ),
      );
    }
    const body = make("tbody");
    this.cells.clear();
    for (const row of this.rows) {
      const line = make(
        "tr",
        {},
        make(
          "th",
          { scope: "row", title: a[row], "data-row": row },
          make("span", { class: "name" }, nameText(two, "a", row)),
          make("span", { class: "text" }, a[row]),
        ),
      );
      for (const column of this.columns) {
        const value = this.values[row][column];
        const self = this.#isSelf(row, column);
        const warm = this.isWarm(row, column);
        const said = `${formatValue(value)}${self ? ", the same text" : warm ? ", similar" : ""}`;
        const cell = make(
          "td",
          {
            role: "gridcell",
            tabindex: -1,
            class: self ? "self" : warm ? "warm" : null,
            "aria-label": said,
            "data-row": row,
            "data-column": column,
          },
          self ? "" : formatValue(value),
        );
        if (!self) {
          const { background, ink } = this.scale.colour(value, warm);
          cell.style.background = background;
          cell.style.color = ink;
        }
        this.cells.set(`${row},${column}`, cell);
        line.append(cell);
      }
      body.append(line);
    }
    const caption = `${this.value === "score" ? "Calibrated score" : "Cosine"} of every pair of texts; arrow keys move`;
    this.table = make(
      "table",
      { role: "grid", "aria-label": caption, class: threshold === null ? null : "judged" },
      make("thead", {}, head),
      body,
    );
    this.box.replaceChildren(this.table);
  }

  /** Choose the size of the cells for the room there is. */
  #fit() {
    if (!this.table) return;
    const room = this.box.clientWidth - 2 * PADDING;
    const wide = room >= LABELS.from;
    const name = LABELS.narrow + (this.comparison.two ? 6 : 0);
    const text = name + Math.max(100, Math.max(...this.comparison.a.map((each) => each.length)) * 1.2 * LETTER);
    const least = wide ? Math.min(text, room * (this.columns.length > MANY ? LABELS.manyShare : LABELS.share)) : name;
    const cell = Math.max(
      wide ? CELL.least : CELL.touch,
      Math.min(CELL.most, Math.floor((room - least) / this.columns.length)),
    );
    const labels = wide ? Math.max(least, Math.min(text, LABELS.wide, room - cell * this.columns.length)) : least;
    this.readout.classList.toggle("long", this.longest * LETTER > room);
    this.table.style.setProperty("--cell", `${cell}px`);
    this.table.style.setProperty("--labels", `${Math.floor(labels)}px`);
    this.table.classList.toggle("wide", wide);
    this.table.classList.toggle("numbers", cell >= CELL.numbers);
    this.table.classList.toggle("upright", wide && this.comparison.two && cell >= COLUMN_TEXTS_FROM);
    this.table.classList.toggle("dense", cell < 20);
    this.table.classList.toggle("tiny", cell < 12);
  }

  #drawLegend() {
    const { low, high, threshold } = this.scale;
    const spots = 48;
    const stops = [];
    const at = (share) => low + share * (high - low);
    const cut = threshold === null ? null : high > low ? (threshold - low) / (high - low) : 1;
    for (let spot = 0; spot < spots; spot += 1) {
      const share = (spot + 0.5) / spots;
      const { background } = this.scale.colour(at(share), cut !== null && share >= cut);
      stops.push(`${background} ${(100 * spot) / spots}% ${(100 * (spot + 1)) / spots}%`);
    }
    const bar = make("div", { class: "bar" });
    bar.style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
    const ends = make(
      "div",
      { class: "ends" },
      make("span", {}, `${this.value === "cosine" && low === 0 ? "≤ " : ""}${formatValue(low)}`),
      make("span", {}, formatValue(high)),
    );
    const parts = [make("div", { class: "ramp" }, bar, ends)];
    if (cut !== null) {
      const mark = make("span", { class: "mark" });
      mark.style.left = `${100 * Math.min(1, Math.max(0, cut))}%`;
      bar.append(mark);
      parts.push(
        make(
          "p",
          {},
          make("span", { class: "swatch" }),
          " similar: cosine ≥ ",
          make("b", {}, formatValue(this.comparison.threshold, 3)),
          ", the decision threshold",
        ),
      );
      parts[1].firstChild.style.background = this.scale.colour(at((cut + 1) / 2), true).background;
    }
    if (this.comparison.dimensions !== null) {
      parts.push(make("p", {}, "No scores and no decision threshold: they were fitted on whole vectors."));
    }
    this.legend.replaceChildren(...parts);
  }

  /** Read a pair out, and mark its row, column and cell. */
  #read(row, column) {
    const { a, b, two, cosines, scores, threshold } = this.comparison;
    const shown = this.value === "score" ? scores[row][column] : cosines[row][column];
    const warm = this.isWarm(row, column);
    const facts = [];
    if (this.#isSelf(row, column)) facts.push("the same text");
    else {
      if (scores)
        facts.push(
          this.value === "score"
            ? `cosine ${formatValue(cosines[row][column], 3)}`
            : `score ${formatValue(scores[row][column], 3)}`,
        );
      if (threshold !== null) facts.push(warm ? "similar" : "not similar");
    }
    const figure = make(
      "p",
      { class: "figure" },
      make("b", {}, formatValue(shown, 3)),
      make("span", {}, this.value, ...facts.flatMap((fact) => [make("i", { "aria-hidden": true }, " · "), fact])),
    );
    const line = (list, at, text) =>
      make(
        "p",
        { class: "quote" },
        make("span", { class: "name" }, nameText(two, list, at)),
        make("span", { class: "text" }, text),
      );
    this.readout.replaceChildren(
      figure,
      make("div", { class: "quotes" }, line("a", row, a[row]), line("b", column, b[column])),
    );
    for (const marked of this.table.querySelectorAll(".here")) marked.classList.remove("here");
    this.table.querySelector(`th[data-row="${row}"]`)?.classList.add("here");
    this.table.querySelector(`th[data-column="${column}"]`)?.classList.add("here");
    this.cells.get(`${row},${column}`)?.classList.add("here");
  }

  #point(target, pin) {
    const cell = target.closest?.("td[data-row]");
    if (!cell) return;
    const [row, column] = [Number(cell.dataset.row), Number(cell.dataset.column)];
    if (pin) this.pin(row, column);
    else this.#read(row, column);
  }

  #restore() {
    if (!this.table || !this.pinned) return;
    for (const cell of this.table.querySelectorAll('td[tabindex="0"]')) cell.tabIndex = -1;
    this.cells.get(this.pinned.join())?.setAttribute("tabindex", "0");
    this.#read(...this.pinned);
  }

  #move(event) {
    const cell = event.target.closest("td[data-row]");
    if (!cell || event.ctrlKey || event.metaKey || event.altKey) return;
    let row = this.rows.indexOf(Number(cell.dataset.row));
    let column = this.columns.indexOf(Number(cell.dataset.column));
    const last = { row: this.rows.length - 1, column: this.columns.length - 1 };
    if (event.key === "ArrowUp") row -= 1;
    else if (event.key === "ArrowDown") row += 1;
    else if (event.key === "ArrowLeft") column -= 1;
    else if (event.key === "ArrowRight") column += 1;
    else if (event.key === "Home") column = 0;
    else if (event.key === "End") column = last.column;
    else if (event.key === "PageUp") row = 0;
    else if (event.key === "PageDown") row = last.row;
    else return;
    event.preventDefault();
    row = Math.min(last.row, Math.max(0, row));
    column = Math.min(last.column, Math.max(0, column));
    this.cells.get(`${this.rows[row]},${this.columns[column]}`).focus();
  }
}
