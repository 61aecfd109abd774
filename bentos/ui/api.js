// The one place that talks to the server.

const NO_MESSAGE = "the answer holds no message; the server's log, or that of the proxy before it, may say more";

/** What the server refused, in its own words; or why there was no answer. */
export class ApiError extends Error {
  constructor(message, { status = null, code = "", retryAfter = null, requestId = null } = {}) {
    super(message);
    this.status = status; // null: there was no answer
    this.code = code;
    this.retryAfter = retryAfter; // the Retry-After header, as sent
    this.requestId = requestId;
  }
}

/** The full address of a route, as a program elsewhere would name it. */
export function addressOf(route) {
  return new URL(route, document.baseURI).href;
}

/**
 * Ask the server and return {content, latencyMs, requestId, space}; `space` is that of this very answer.
 * `body` undefined: GET. Throws ApiError; an aborted request throws the browser's AbortError.
 */
export async function ask(route, { body, key = "", signal } = {}) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key) headers.Authorization = `Bearer ${key}`;
  const started = performance.now();
  let response, text;
  try {
    response = await fetch(addressOf(route), {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      credentials: "omit",
      cache: "no-store",
      redirect: "error",
      signal,
    });
    text = await response.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(
      `no answer from ${addressOf(route)} (${error.message}); check that the server runs and try again`,
    );
  }
  const latencyMs = performance.now() - started;
  const requestId = response.headers.get("X-Request-Id");
  const space = response.headers.get("X-Ekiben-Space");
  let content = null;
  try {
    content = JSON.parse(text);
  } catch {
    // not JSON: told below
  }
  if (response.ok && content !== null) return { content, latencyMs, requestId, space };
  throw new ApiError(content?.error?.message ?? NO_MESSAGE, {
    status: response.status,
    code: content?.error?.code ?? response.statusText,
    retryAfter: response.headers.get("Retry-After"),
    requestId,
  });
}
