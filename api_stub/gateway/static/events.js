// Follow a job: server-sent events over fetch (EventSource cannot send a key), taken up again after every break.

const FIRST_PAUSE_MS = 500;
const MAX_PAUSE_MS = 8000;

/** Yield a job's events from its beginning to the final one, each once, whatever happens to the connection. */
export async function* follow(api, id, signal, onBreak = () => {}) {
  let lastId = 0;
  let pause = FIRST_PAUSE_MS;
  while (!signal.aborted) {
    try {
      const body = await api.stream(id, lastId, signal);
      if (body === null) return;
      for await (const event of parsed(body)) {
        if (event.seq === undefined) break; // a problem instead of an event: coming back is answered with it
        pause = FIRST_PAUSE_MS;
        if (event.type !== "stream.gap") {
          if (event.seq <= lastId) continue;
          lastId = event.seq;
        }
        yield event;
        if (isFinal(event)) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error.status && error.status < 500 && error.status !== 429) throw error;
      onBreak(error);
    }
    await sleep(pause, signal);
    pause = Math.min(2 * pause, MAX_PAUSE_MS);
  }
}

export function isFinal(event) {
  return ["job.completed", "job.failed", "job.cancelled", "job.expired"].includes(event.type);
}

async function* parsed(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
        if (data.length) yield JSON.parse(data.join("\n"));
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function sleep(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
