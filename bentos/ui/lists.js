// The lists beside the map: nearest pairs, and what each text cost in tokens.

import { formatValue, make, nameText, plural } from "./dom.js";

export const FIRST_PAIRS = 8;
const MOST_PAIRS = 500;

/** Fill `box` with the first `count` of `pairs`, the decision threshold drawn between them; return how many. */
export function showPairs(box, shown, pairs, { value, count, onPick, colour }) {
  const listed = pairs.slice(0, Math.min(count, MOST_PAIRS));
  const items = [];
  const divider = () =>
    make("li", { class: "divider" }, make("span", {}, `decision threshold ${formatValue(shown.threshold, 3)}`));
  let above = shown.threshold !== null;
  for (const { row, column, cosine } of listed) {
    if (above && cosine < shown.threshold) {
      items.push(divider());
      above = false;
    }
    const number = value === "score" ? shown.scores[row][column] : cosine;
    const figure = make("b", {}, formatValue(number, 3));
    const swatch = make("i", { "aria-hidden": true });
    swatch.style.background = colour(row, column);
    const quote = (list, at, text) =>
      make(
        "span",
        { class: "quote" },
        make("span", { class: "name" }, nameText(shown.two, list, at)),
        make("span", { class: "text" }, text),
      );
    const button = make(
      "button",
      { type: "button" },
      make("span", { class: "figure" }, swatch, figure),
      quote("a", row, shown.a[row]),
      quote("b", column, shown.b[column]),
    );
    button.addEventListener("click", () => onPick(row, column));
    items.push(make("li", {}, button));
  }
  if (above && listed.length === pairs.length) items.push(divider());
  box.replaceChildren(...items);
  return listed.length;
}

/** How many pairs a list can show at most. */
export const listable = (pairs) => Math.min(pairs.length, MOST_PAIRS);

/** Fill `box` with one row a text: its tokens, against the `limit` of the model, and how many were cut off. */
export function showUsage(box, shown, limit) {
  const lists = shown.two
    ? [
        ["a", shown.a],
        ["b", shown.b],
      ]
    : [["a", shown.a]];
  const longest = Math.max(limit ?? 0, ...shown.usage.flatMap(({ tokens }) => tokens));
  const body = make("tbody");
  lists.forEach(([list, texts], index) => {
    const { tokens, truncated } = shown.usage[index];
    const cut = new Set(truncated);
    texts.forEach((text, at) => {
      const fill = make("span", { class: "fill" });
      fill.style.width = `${(100 * tokens[at]) / longest}%`;
      const meter = make("span", { class: "meter", "aria-hidden": true }, fill);
      if (limit && cut.has(at)) {
        const over = make("span", { class: "over" });
        over.style.left = `${(100 * limit) / longest}%`;
        over.style.right = `${100 - (100 * tokens[at]) / longest}%`;
        meter.append(over);
      }
      const note = cut.has(at)
        ? make("span", { class: "cut" }, limit ? `${plural(tokens[at] - limit, "token")} cut off` : "cut")
        : "";
      body.append(
        make(
          "tr",
          { class: cut.has(at) ? "truncated" : null },
          make(
            "th",
            { scope: "row" },
            make("span", { class: "name" }, nameText(shown.two, list, at)),
            make("span", { class: "text", title: text }, text),
          ),
          make("td", { class: "number" }, tokens[at].toLocaleString("en")),
          make("td", {}, meter, note),
        ),
      );
    });
  });
  const head = make(
    "thead",
    { class: "hidden" },
    make(
      "tr",
      {},
      make("th", { scope: "col" }, "Text"),
      make("th", { scope: "col" }, "Tokens"),
      make("th", { scope: "col" }, "Of the model's limit"),
    ),
  );
  box.replaceChildren(make("table", {}, make("colgroup", {}, make("col"), make("col"), make("col")), head, body));
}

/** The way back from these values to what made them: what the answer says of itself, and /health's `info` of that model. */
export function showWayBack(box, shown, info) {
  const known = info.model === shown.model ? info : {}; // else another version has become live since
  const stations = [
    ["answered by", shown.model],
    ["version", known.version],
    ["run", known.run_id],
    ["space", shown.space ?? known.space_id],
    ["precision", known.precision],
  ];
  if (shown.requestId) stations.push(["request", shown.requestId]);
  const facts = stations
    .filter(([, value]) => value !== undefined && value !== null)
    .map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value))));
  box.replaceChildren(make("dl", {}, ...facts));
}
