// The server's API: models, and one streamed chat completion as events.
//
// Addresses are relative to the page, so that it works below any path of a proxy.

/** What went wrong, for people: `status` is HTTP's, 0 when no answer came. */
export class ApiError extends Error {
  constructor(message, status = 0, wait = null) {
    super(message);
    this.status = status;
    this.wait = wait; // seconds that the server asked to wait
  }
}

export async function listModels(key) {
  const response = await ask("v1/models", { headers: headers(key) });
  return (await response.json()).data.map((model) => model.id);
}

/** Yields the chunks of a chat completion; an abort of `signal` closes the connection and the server stops. */
export async function* streamCompletion(body, key, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let done = false;
  for await (const data of readEvents(response.body, signal)) {
    if ((done = data === "[DONE]")) break;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ApiError("The server sent something that is not JSON.", response.status);
    }
    if (chunk.error) throw new ApiError(chunk.error.message ?? "The server failed.", chunk.error.status ?? 500);
    yield chunk;
  }
  if (!done && !signal.aborted) throw new ApiError("The connection ended before the answer did.");
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it running, and is this device online?");
  }
  if (response.ok) return response;
  let detail = "";
  try {
    const body = await response.json();
    detail = body.error?.message ?? "";
  } catch {
    // no JSON: the status alone has to do
  }
  throw new ApiError(explain(response.status, detail), response.status, waiting(response));
}

function explain(status, detail) {
  if (status === 401) return "The server asks for an API key.";
  if (status === 403) return detail || "The server does not allow this.";
  if (status === 429) return "The server is busy with other requests.";
  if (status === 503) return detail || "The server is starting or shutting down.";
  if (status === 413) return detail || "The conversation is larger than the server accepts.";
  return detail || `The server answered with status ${status}.`;
}

function waiting(response) {
  const seconds = Number(response.headers.get("Retry-After") ?? NaN);
  return Number.isFinite(seconds) ? Math.max(1, Math.ceil(seconds)) : null;
}

/** The data of server-sent events, as text. */
async function* readEvents(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
  } catch (error) {
    if (signal.aborted || error instanceof ApiError) throw error;
    throw new ApiError("The connection broke before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
