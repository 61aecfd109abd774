// The page: reads the form, asks, and shows the answer. What is where: comparison.js asks and ranks, heatmap.js draws
// the matrix, lists.js the rest, snippets.js writes the code.

import { ApiError, ask } from "./api.js";
import { darkTheme } from "./colours.js";
import { compare, groupAlike, rankPairs, readLines } from "./comparison.js";
import { byId, make, plural } from "./dom.js";
import { EXAMPLES } from "./examples.js";
import { HeatMap } from "./heatmap.js";
import { FIRST_PAIRS, listable, showPairs, showUsage, showWayBack } from "./lists.js";
import { writeSnippets } from "./snippets.js";

const KEY_STORE = "ekiben-api-key"; // sessionStorage: this tab, until it is closed
const LARGE = 22; // from more texts on, the map has the whole width
const form = byId("ask");
const fields = form.elements;
const map = new HeatMap({ box: byId("matrix"), readout: byId("readout"), legend: byId("legend") });

let info = {}; // /health's answer
let shown = null; // the comparison on the page
let pairs = [];
let pairCount = FIRST_PAIRS;
let snippet = "curl";
let asking = null; // AbortController of the request in flight

const isTwo = () => fields.mode.value === "two";
const readKey = () => byId("key").value.trim();

// ---------------------------------------------------------------- what is served

async function loadInfo() {
  try {
    info = (await ask("health", { key: readKey() })).content;
    serve("ok", info.model);
  } catch (error) {
    info = {};
    serve("problem", error.status === 401 ? "needs an API key" : "not ready");
    showError(error);
    return;
  }
  fillPrompts();
  fillDimensions();
}

function serve(state, text) {
  byId("served").dataset.state = state;
  byId("served-model").textContent = text;
}

function fillPrompts() {
  const prompts = Object.keys(info.prompts ?? {});
  const usual = info.default_prompt;
  const options = [["default", usual ? `the model's default: ${usual}` : "none"]];
  for (const name of prompts) options.push([`name:${name}`, `${name}: ${JSON.stringify(info.prompts[name])}`]);
  if (usual) options.push(["none", "none"]);
  options.push(["literal", "another text…"]);
  refill(byId("prompt"), options);
}

function fillDimensions() {
  const sizes = new Set(info.nested_dims ?? []); // that the model was trained for
  if (info.allow_truncated_dimensions)
    for (let size = 2 ** Math.floor(Math.log2((info.dim ?? 1) - 1)); size >= 8; size /= 2) sizes.add(size);
  byId("field-dimensions").hidden = !sizes.size;
  const offered = [...sizes].sort((one, other) => other - one).map((size) => [String(size), String(size)]);
  refill(byId("dimensions"), [["", `all ${info.dim}`], ...offered]);
}

/** Offer `options` ([value, label]) and keep the choice where it is still offered. */
function refill(select, options) {
  const chosen = select.value;
  select.replaceChildren(...options.map(([value, label]) => make("option", { value }, label)));
  if (options.some(([value]) => value === chosen)) select.value = chosen;
}

// ---------------------------------------------------------------- asking

function readQuestion() {
  return {
    two: isTwo(),
    a: readLines(byId("texts-a").value),
    b: readLines(byId("texts-b").value),
    prompt: byId("prompt").value,
    promptText: byId("prompt-text").value,
    dimensions: byId("field-dimensions").hidden || !byId("dimensions").value ? null : Number(byId("dimensions").value),
  };
}

/** What to do before asking makes sense, or null. */
function findGap({ two, a, b }) {
  if (two) return a.length && b.length ? null : "Both lists need at least one text.";
  return a.length >= 2 ? null : "Write at least two texts, one a line.";
}

async function submit() {
  const question = readQuestion();
  const gap = findGap(question);
  hideError();
  if (gap) {
    say(gap);
    byId(question.two && question.a.length ? "texts-b" : "texts-a").focus();
    return;
  }
  asking?.abort();
  const current = (asking = new AbortController());
  say(`Comparing ${plural(question.a.length + (question.two ? question.b.length : 0), "text")}…`);
  byId("compare").setAttribute("aria-busy", "true");
  try {
    const comparison = await compare(question, { key: readKey(), signal: current.signal });
    if (comparison.model !== info.model) await loadInfo(); // another version answers now
    shown = comparison;
    pairs = rankPairs(shown);
    pairCount = FIRST_PAIRS;
    showAnswer();
    sayDone();
    if (byId("map-card").getBoundingClientRect().top > 0.8 * window.innerHeight) byId("map-card").scrollIntoView();
  } catch (error) {
    if (error.name === "AbortError") return;
    showError(error);
    say(shown ? "The results are those of the request before." : "");
  } finally {
    if (asking === current) {
      asking = null;
      byId("compare").removeAttribute("aria-busy");
    }
  }
}

const say = (text) => byId("status").replaceChildren(text);

function sayDone() {
  const total = shown.usage.reduce((sum, { total_tokens: tokens }) => sum + tokens, 0);
  const cut = shown.usage.reduce((sum, { truncated }) => sum + truncated.length, 0);
  const latency = shown.latencyMs < 10 ? shown.latencyMs.toFixed(1) : Math.round(shown.latencyMs);
  say(
    `${plural(
      shown.usage.reduce((sum, { tokens }) => sum + tokens.length, 0),
      "text",
    )}, ${plural(total, "token")}, ` + `${latency} ms round trip${cut ? `; ${plural(cut, "text")} cut` : ""}.`,
  );
}

function showError(error) {
  if (!(error instanceof ApiError)) console.error(error); // a fault of this page: told below all the same
  const box = byId("error");
  const title = error.status
    ? `${error.status} ${error.code}`
    : error instanceof ApiError
      ? "No answer"
      : "This page failed";
  box.replaceChildren(make("strong", {}, title), make("p", {}, error.message));
  if (error.retryAfter)
    box.append(
      make(
        "p",
        {},
        /^\d+$/.test(error.retryAfter)
          ? `Try again in ${error.retryAfter} s (Retry-After).`
          : `Try again after ${error.retryAfter} (Retry-After).`,
      ),
    );
  if (error.requestId) box.append(make("p", { class: "aside" }, "request ", make("code", {}, error.requestId)));
  box.hidden = false;
  box.scrollIntoView({ block: "nearest" });
  if (error.status === 401) {
    byId("access").open = true;
    byId("key").focus();
  }
}

function hideError() {
  byId("error").hidden = true;
  byId("error").replaceChildren();
}

// ---------------------------------------------------------------- showing

function view() {
  const value = shown.scores ? document.querySelector('input[name="value"]:checked').value : "cosine";
  return { value, fit: byId("fit").checked };
}

function showAnswer() {
  byId("empty").hidden = true;
  for (const id of ["map-card", "pairs-card", "usage-card", "code-card", "wayback"]) byId(id).hidden = false;
  byId("value-control").hidden = !shown.scores;
  byId("group-control").hidden = shown.two || shown.a.length < 3;
  const large = Math.max(shown.a.length, shown.b.length) > LARGE;
  (large ? byId("results") : byId("left")).prepend(byId("map-card"));
  drawMap(pairs.length ? [pairs[0].row, pairs[0].column] : [0, 0]);
  drawPairs();
  showUsage(byId("usage"), shown, info.max_tokens);
  const total = shown.usage.reduce((sum, { total_tokens: tokens }) => sum + tokens, 0);
  byId("usage-total").textContent =
    `${total.toLocaleString("en")} in all${info.max_tokens ? `, at most ${info.max_tokens} a text` : ""}`;
  showWayBack(byId("wayback"), shown, info);
  drawSnippet();
}

function drawMap(pinned) {
  const order = !shown.two && byId("group").checked ? groupAlike(shown.cosines) : null;
  map.show(shown, { ...view(), order, pinned });
}

function drawPairs() {
  const { value } = view();
  const count = showPairs(byId("pairs"), shown, pairs, {
    value,
    count: pairCount,
    colour: (row, column) => map.colourOf(row, column),
    onPick: (row, column) => map.pin(row, column),
  });
  byId("pairs-count").textContent =
    count < pairs.length ? `${count} of ${plural(pairs.length, "pair")}` : plural(pairs.length, "pair");
  const all = listable(pairs);
  byId("more-pairs").hidden = count >= all && pairCount <= FIRST_PAIRS;
  byId("more-pairs").textContent =
    count < all ? `Show ${all === pairs.length ? "all" : "the first"} ${all.toLocaleString("en")}` : "Show fewer";
}

function drawSnippet() {
  const texts = writeSnippets(shown, {
    withKey: readKey() !== "",
    value: view().value,
    unitLength: info.normalize !== false,
  });
  byId("tabs").replaceChildren(
    ...Object.keys(texts).map((name) =>
      make(
        "button",
        {
          type: "button",
          role: "tab",
          id: `tab-${name.replace(" ", "-")}`,
          "aria-controls": "snippet",
          "aria-selected": String(name === snippet),
          tabindex: name === snippet ? 0 : -1,
        },
        name,
      ),
    ),
  );
  byId("snippet").setAttribute("aria-labelledby", `tab-${snippet.replace(" ", "-")}`);
  byId("snippet").firstElementChild.textContent = texts[snippet];
}

function redraw() {
  if (!shown) return;
  drawMap(map.pinned);
  drawPairs();
  drawSnippet();
}

async function copySnippet() {
  const code = byId("snippet").firstElementChild;
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    // no clipboard on plain http from elsewhere: select the text, and let the browser's own command try
    const range = document.createRange();
    range.selectNodeContents(code);
    const selection = window.getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    if (!document.execCommand("copy")) {
      say("The code is selected: copy it with Ctrl+C.");
      return;
    }
  }
  say(`Copied: ${snippet}.`);
  byId("copy").textContent = "Copied";
  setTimeout(() => (byId("copy").textContent = "Copy"), 1600);
}

// ---------------------------------------------------------------- the form

function arrange() {
  const two = isTwo();
  byId("field-b").hidden = !two;
  byId("label-a").replaceChildren(
    ...(two ? [make("b", {}, "a"), ": one text a line, a row each"] : ["One text a line"]),
  );
  byId("prompt-text").hidden = byId("prompt").value !== "literal";
  for (const list of ["a", "b"])
    byId(`count-${list}`).textContent = plural(readLines(byId(`texts-${list}`).value).length, "text");
}

function tryExample({ mode, a, b }) {
  form.querySelector(`input[name="mode"][value="${mode}"]`).checked = true;
  byId("texts-a").value = a.join("\n");
  byId("texts-b").value = b.join("\n");
  arrange();
}

function drawGhost() {
  const svg = "http://www.w3.org/2000/svg";
  for (let row = 0; row < 6; row += 1) {
    for (let column = 0; column < 6; column += 1) {
      const cell = document.createElementNS(svg, "rect");
      const near = row >> 1 === column >> 1;
      for (const [name, value] of Object.entries({ x: column * 28 + 1, y: row * 28 + 1, width: 26, height: 26, rx: 3 }))
        cell.setAttribute(name, value);
      cell.setAttribute("class", row === column ? "self" : near ? "near" : "far");
      byId("ghost").append(cell);
    }
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
form.addEventListener("input", arrange);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    submit();
  }
});
byId("key").addEventListener("change", () => {
  if (readKey()) sessionStorage.setItem(KEY_STORE, readKey());
  else sessionStorage.removeItem(KEY_STORE);
  if (shown) drawSnippet();
  if (!info.model) loadInfo();
});
byId("map-card").addEventListener("change", redraw);
byId("more-pairs").addEventListener("click", () => {
  pairCount = pairCount > FIRST_PAIRS ? FIRST_PAIRS : Infinity;
  drawPairs();
});
byId("copy").addEventListener("click", copySnippet);
byId("tabs").addEventListener(
  "click",
  (event) => event.target.getAttribute("role") === "tab" && chooseSnippet(event.target.textContent),
);
byId("tabs").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const names = [...byId("tabs").children].map((tab) => tab.textContent);
  chooseSnippet(names[(names.indexOf(snippet) + step + names.length) % names.length]);
  byId("tabs").querySelector('[aria-selected="true"]').focus();
});
darkTheme.addEventListener("change", redraw);

function chooseSnippet(name) {
  snippet = name;
  drawSnippet();
}

byId("key").value = sessionStorage.getItem(KEY_STORE) ?? "";
byId("access").open = readKey() !== "";
byId("examples").append(
  ...EXAMPLES.map((example) => {
    const button = make("button", { type: "button", class: "chip" }, example.name);
    button.addEventListener("click", () => tryExample(example));
    return button;
  }),
);
if (!byId("texts-a").value) tryExample(EXAMPLES[0]);
drawGhost();
arrange();
loadInfo();
