// The server.

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function call(path, options = {}) {
  const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...(options.body && { "Content-Type": "application/json" }) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server can't be reached. Is it still running?");
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => null);
  throw new Refused(answer.status, said?.error?.message || `The server answered with status ${answer.status}.`);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const data = JSON.parse(line.slice(6));
      if (data.error) throw new Refused(data.error.code === "timeout" ? 503 : 500, data.error.message);
      yield data;
    }
  }
}

let contextTokens = 0;

async function showModel() {
  try {
    const models = (await (await call("/v1/models")).json()).data;
    const name = models[0].id;
    contextTokens = models[0].max_model_len;
    showModels(models.map(({ id }) => id));
    showSuggestions((await (await call("/props")).json()).modalities);
    $("name").textContent = name;
    document.title = name;
    return true;
  } catch (error) {
    if (error.status === 401) askForKey();
    else notice(error.message);
    return false;
  }
}

function askForKey() {
  if (key) $("key-why").textContent = "The server does not take this key.";
  if (!$("key-dialog").open) $("key-dialog").showModal();
  $("key").select();
}

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = kept("key", $("key").value.trim());
  if (await showModel()) {
    $("key-dialog").close();
    notice("");
    $("text").focus();
  }
});
