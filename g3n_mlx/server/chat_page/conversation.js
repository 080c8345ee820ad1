// The conversation.

let messages = []; // as the server takes them
let running = null; // what stops the answer that is coming

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function ready() {
  $("send").disabled = !$("text").value.trim() && !chosen.length;
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  $("new").disabled = !messages.length && !$("log").hasChildNodes();
}

function fit() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight}px`;
}

async function send() {
  const text = $("text").value.trim(), files = chosen;
  if (running || (!text && !files.length)) return;
  notice("");
  let parts;
  try {
    parts = await Promise.all(files.map(partOf));
  } catch (error) {
    notice(error.message);
    return;
  }
  if (text) parts.push({ type: "text", text });
  const question = make("article", "question", make("h3", "unseen", "You"));
  if (files.length) question.append(make("div", "media", ...files.map(shown)));
  if (text) question.append(make("div", "said", text));
  $("log").append(question);
  $("empty").hidden = true;
  $("log").hidden = false;
  $("text").value = "";
  chosen = [];
  showChosen();
  fit();
  messages.push({ role: "user", content: parts.length === 1 && text ? text : parts });
  sticks = true;
  await answer();
}

async function answer() {
  const words = make("div", "words");
  const node = make("article", "answer", make("h3", "unseen", "Answer"), words);
  const wait = make("div", "wait", make("i"), make("i"), make("i"));
  wait.setAttribute("role", "status");
  wait.setAttribute("aria-label", "The model is reading");
  words.append(wait);
  node.setAttribute("aria-busy", "true");
  $("log").append(node);
  toBottom();
  const view = new Words(words), question = messages.at(-1), before = messages.length - 1, chat = messages;
  let text = "", reason = null, usage = null, failure = null, drawn = 0;
  const draw = () => {
    drawn = 0;
    if (text.trim()) view.show(text);
    if (sticks) toBottom();
  };
  running = new AbortController();
  ready();
  const temperature = kept("temperature"), system = $("system").value.trim();
  const body = {
    model: "default",
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
    ...(temperature && { temperature: Number(temperature) }),
  };
  try {
    words.classList.add("coming");
    for await (const chunk of events(await call("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal: running.signal }))) {
      usage = chunk.usage || usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      text += choice.delta.content || "";
      reason = choice.finish_reason || reason;
      drawn ||= requestAnimationFrame(draw);
    }
    if (!reason) throw new Refused(0, "The connection to the server broke.");
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else failure = error instanceof Refused ? error : new Refused(0, "The connection to the server broke.");
  }
  cancelAnimationFrame(drawn);
  running = null;
  words.classList.remove("coming");
  wait.remove();
  draw();
  node.removeAttribute("aria-busy");
  if (text) chat.push({ role: "assistant", content: text });
  // What the server can't take would make every further question fail.
  if ([400, 413, 422].includes(failure?.status)) {
    chat.length = before;
    reason = "refused";
  }
  if (failure) {
    const box = make("div", "error", failure.message);
    box.setAttribute("role", "alert");
    node.append(box);
    if (failure.status === 401) askForKey();
  }
  const again = tool("Again", ICONS.again, () => {
    if (running) return;
    chat.length = before;
    chat.push(question);
    while (node.nextSibling) node.nextSibling.remove();
    node.remove();
    sticks = true;
    answer();
  });
  const below = make("div", "below");
  if (text) below.append(copier(() => text));
  below.append(again, make("span", "figures", figures(text, reason, usage)));
  node.append(below);
  ready();
  if (sticks) toBottom();
}

function figures(text, reason, usage) {
  const said = [];
  if (reason === "stopped") said.push("stopped");
  if (reason === "refused") said.push("left out of the conversation");
  if (reason === "stop" && !text.trim()) said.push("an empty answer");
  if (reason === "length") said.push("cut at the limit of tokens");
  if (usage) {
    said.push(`${usage.completion_tokens} token${usage.completion_tokens === 1 ? "" : "s"}`);
    if (usage.avg_compl_tok_per_sec) said.push(`${usage.avg_compl_tok_per_sec.toFixed(usage.avg_compl_tok_per_sec < 10 ? 1 : 0)} tok/s`);
    if (usage.time_to_first_token_s) said.push(`first after ${usage.time_to_first_token_s.toFixed(usage.time_to_first_token_s < 10 ? 2 : 0)} s`);
  }
  return said.join(" · ");
}

function stop() {
  running?.abort();
  $("text").focus();
}

function newChat() {
  stop();
  messages = [];
  $("log").replaceChildren();
  $("log").hidden = true;
  $("empty").hidden = false;
  $("latest").hidden = sticks = true;
  notice("");
  ready();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("text").addEventListener("input", () => {
  fit();
  ready();
});
$("text").addEventListener("keydown", (event) => {
  // On a phone's keyboard, Enter is the only way to a new line.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !matchMedia("(pointer: coarse)").matches) {
    event.preventDefault();
    send();
  }
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", newChat);
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("key-dialog").open && !$("settings").matches(":popover-open")) {
    if (recorder) finishRecording(false);
    else if (running) stop();
  } else if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    newChat();
  }
});
