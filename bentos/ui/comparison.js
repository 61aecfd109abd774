// One question to the server and its answer, as the rest of the page shows it.

import { ask } from "./api.js";

/** The texts of a text area: one a line, empty lines left out. */
export function readLines(text) {
  return text.split("\n").filter((line) => line.trim() !== "");
}

/** The fields of a request that say which prompt is put before the texts. */
function promptFields({ prompt, promptText }) {
  if (prompt === "literal") return { prompt_text: promptText };
  if (prompt === "none") return { prompt_text: "" };
  return prompt.startsWith("name:") ? { prompt: prompt.slice("name:".length) } : {};
}

/**
 * Compare the texts of `question` {two, a, b, prompt, promptText, dimensions}.
 *
 * One request to /similarity; for vectors of fewer dimensions one to /encode, and the cosines are computed here: then
 * there are no scores and no threshold, which were fitted on whole vectors.
 */
export async function compare(question, options) {
  const a = question.a;
  const b = question.two ? question.b : question.a;
  const shared = promptFields(question);
  if (question.dimensions === null) {
    const { content, ...about } = await ask("similarity", { ...options, body: { a, b, ...shared } });
    return {
      ...question,
      b,
      shared,
      ...about,
      cosines: content.similarity,
      scores: content.scores,
      threshold: content.decision_threshold,
      model: content.model,
      usage: [content.usage.a, ...(question.two ? [content.usage.b] : [])],
    };
  }
  const texts = question.two ? [...a, ...b] : a;
  const body = { texts, dimensions: question.dimensions, normalize: true, encoding: "base64", ...shared };
  const { content, ...about } = await ask("encode", { ...options, body });
  const vectors = content.embeddings.map(decodeFloats);
  const [rows, columns] = question.two ? [vectors.slice(0, a.length), vectors.slice(a.length)] : [vectors, vectors];
  const cosines = rows.map((row) => columns.map((column) => row.reduce((sum, part, at) => sum + part * column[at], 0)));
  const usage = question.two ? splitUsage(content.usage, a.length) : [content.usage];
  return { ...question, b, shared, ...about, cosines, scores: null, threshold: null, model: content.model, usage };
}

function decodeFloats(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return new Float32Array(bytes.buffer); // little endian, as the API says and every browser is
}

function splitUsage({ tokens, truncated }, count) {
  const part = (from, to) => ({
    tokens: tokens.slice(from, to),
    truncated: truncated.filter((row) => row >= from && row < to).map((row) => row - from),
    total_tokens: tokens.slice(from, to).reduce((sum, each) => sum + each, 0),
  });
  return [part(0, count), part(count, tokens.length)];
}

/** All pairs, nearest first; within one list each pair once. By cosine: scores grow with it but can tie. */
export function rankPairs({ two, cosines }) {
  const pairs = [];
  cosines.forEach((values, row) => {
    for (let column = two ? 0 : row + 1; column < values.length; column += 1) {
      pairs.push({ row, column, cosine: values[column] });
    }
  });
  return pairs.sort((one, other) => other.cosine - one.cosine);
}

/** An order of one list in which texts that are alike stand together: average linkage, leaves from left to right. */
export function groupAlike(cosines) {
  let groups = cosines.map((_, row) => [row]);
  const alike = (one, other) => {
    let sum = 0;
    for (const row of one) for (const column of other) sum += cosines[row][column];
    return sum / (one.length * other.length);
  };
  const near = cosines.map((values) => [...values]); // near[i][j]: mean cosine of groups i and j
  while (groups.length > 1) {
    let [left, right, best] = [0, 1, -Infinity];
    for (let i = 0; i < groups.length; i += 1) {
      for (let j = i + 1; j < groups.length; j += 1) if (near[i][j] > best) [left, right, best] = [i, j, near[i][j]];
    }
    const ends = cosines[groups[left].at(-1)];
    const turned = ends[groups[right].at(-1)] > ends[groups[right][0]]; // the nearer end meets the other group
    groups[left] = [...groups[left], ...(turned ? groups[right].reverse() : groups[right])];
    groups = groups.filter((_, at) => at !== right);
    near.splice(right, 1);
    for (const values of near) values.splice(right, 1);
    groups.forEach((group, at) => {
      if (at !== left) near[left][at] = near[at][left] = alike(groups[left], group);
    });
  }
  return groups[0];
}
