// The request behind what is shown, for a shell and for Python. Keys never appear: the snippets name $EKIBEN_API_KEY.

import { addressOf } from "./api.js";

const KEY = "EKIBEN_API_KEY";

/** JSON, one text a line. */
function layOut(body) {
  const fields = Object.entries(body).map(([name, value]) => {
    if (!Array.isArray(value)) return `  ${JSON.stringify(name)}: ${JSON.stringify(value)}`;
    return `  ${JSON.stringify(name)}: [\n${value.map((text) => `    ${JSON.stringify(text)}`).join(",\n")}\n  ]`;
  });
  return `{\n${fields.join(",\n")}\n}`;
}

/** A JSON string is a Python string too, a list of them a list. */
function pythonList(name, texts) {
  return `${name} = [\n${texts.map((text) => `    ${JSON.stringify(text)},`).join("\n")}\n]`;
}

const quoteShell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function pythonLists({ two, a, b }) {
  return two ? `${pythonList("a", a)}\n${pythonList("b", b)}` : pythonList("texts", a);
}

/** `{"prompt": "query"}` -> `"prompt": "query"`; values are strings and numbers, written alike in both languages. */
function pythonFields(fields) {
  return Object.entries(fields)
    .map(([name, value]) => `, ${JSON.stringify(name)}: ${JSON.stringify(value)}`)
    .join("");
}

function curl(shown, withKey) {
  const [route, body] =
    shown.dimensions === null
      ? ["similarity", { a: shown.a, b: shown.b, ...shown.shared }]
      : [
          "encode",
          {
            texts: shown.two ? [...shown.a, ...shown.b] : shown.a,
            dimensions: shown.dimensions,
            normalize: true,
            ...shown.shared,
          },
        ];
  const lines = [`curl -sS ${addressOf(route)}`, "-H 'Content-Type: application/json'"];
  if (withKey) lines.push(`-H "Authorization: Bearer $${KEY}"`);
  return `${[...lines, `-d ${quoteShell(layOut(body))}`].join(" \\\n  ")}\n`;
}

function httpx(shown, withKey, value) {
  const whole = shown.dimensions === null;
  const imports = [withKey && "import os\n", "import httpx", !whole && "import numpy as np"].filter(Boolean).join("\n");
  const lists = shown.two ? '"a": a, "b": b' : '"a": texts, "b": texts';
  const body = whole
    ? `{${lists}${pythonFields(shown.shared)}}`
    : `{"texts": ${shown.two ? "a + b" : "texts"}, "dimensions": ${shown.dimensions}, "normalize": True${pythonFields(shown.shared)}}`;
  const headers = withKey ? `\n    headers={"Authorization": f"Bearer {os.environ['${KEY}']}"},` : "";
  const call = `response = httpx.post(
    ${JSON.stringify(addressOf(whole ? "similarity" : "encode"))},
    json=${body},${headers}
    timeout=60,
)
if response.is_error:
    raise SystemExit(response.text)`;
  const result = whole
    ? `similarity = response.json()["${value === "score" ? "scores" : "similarity"}"]`
    : `vectors = np.array(response.json()["embeddings"])\n${cosines(shown)}`;
  return `${imports}\n\n${pythonLists(shown)}\n${call}\n${result}\nprint(similarity)\n`;
}

const cosines = ({ two }) => `similarity = ${two ? "vectors[: len(a)] @ vectors[len(a) :].T" : "vectors @ vectors.T"}`;

function openai(shown, withKey, unitLength) {
  const options = [`model=${JSON.stringify(shown.model)}`, `input=${shown.two ? "a + b" : "texts"}`];
  if (shown.dimensions !== null) options.push(`dimensions=${shown.dimensions}`);
  const extra = pythonFields(shown.shared).slice(2);
  if (extra) options.push(`extra_body={${extra}}`);
  const scale = unitLength ? "" : "vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)\n";
  return `${withKey ? "import os\n\n" : ""}import numpy as np
from openai import OpenAI

${pythonLists(shown)}
client = OpenAI(base_url=${JSON.stringify(addressOf("v1"))}, api_key=${withKey ? `os.environ["${KEY}"]` : '"not needed"'})
answer = client.embeddings.create(${options.join(", ")})
vectors = np.array([item.embedding for item in answer.data])
${scale}${cosines(shown)}
print(similarity)
`;
}

/** Name -> snippet for what is shown. `value`: `cosine` or `score`; `unitLength`: whether the model normalises. */
export function writeSnippets(shown, { withKey, value, unitLength }) {
  return {
    curl: curl(shown, withKey),
    Python: httpx(shown, withKey, value),
    "OpenAI client": openai(shown, withKey, unitLength),
  };
}
