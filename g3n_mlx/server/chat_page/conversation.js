// What is asked and answered, and how it is shown.

let running = null; // what stops the answer that is coming
let editing = null; // the question whose edited form is being written

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function ready() {
  $("send").disabled = !$("text").value.trim() && !chosen.length;
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  $("new").disabled = !conversation && !$("log").hasChildNodes();
}

function fit() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight}px`;
}

async function withinBounds(media) {
  if (!media.length || bytesOf(await everyMessage()) + bytesOf([{ media }]) <= MOST_BYTES) return true;
  notice("This browser keeps a gibibyte of pictures, sound and videos for the page: delete or export conversations first.");
  return false;
}

async function send() {
  const text = $("text").value.trim(), media = chosen;
  if (running || (!text && !media.length)) return;
  notice("");
  running = new AbortController(); // a second Enter must not ask twice
  if (!(await withinBounds(media))) {
    running = null;
    return;
  }
  const edits = editing !== null, drafts = edits ? [] : draftsOf(draftId());
  if (!conversation) {
    conversation = { id: newId(), title: titleOf(text, media), created: Date.now(), updated: Date.now(), leaf: null };
    history.replaceState(null, "", `#${conversation.id}`);
  }
  const parent = editing ? editing.parent : conversation.leaf;
  finishEditing();
  if (edits) {
    await showDraft(); // which was put aside for the edited question
  } else {
    $("text").value = "";
    chosen = [];
    showChosen();
    fit();
  }
  const fields = { parent, role: "user", text, media: media.map(({ kind, file }) => ({ kind, file })) };
  const asked = await addNode(fields, conversation, nodes, drafts);
  tellTabs();
  sticks = true;
  showBranch();
  await answer(asked);
}

// Showing.

function showBranch() {
  const path = branch();
  $("log").replaceChildren(...path.map((node) => (node.role === "user" ? questionNode(node) : answerNode(node))));
  $("log").hidden = !path.length;
  $("empty").hidden = Boolean(path.length);
  $("latest").hidden = true;
  ready();
  showContext();
  if (sticks) toBottom();
}

/** The branch that ends with a node, as the server takes it. */
const asMessages = (node) => Promise.all(pathTo(node).filter(({ role, text }) => role === "user" || text).map(asSent));

/** Arrows between the children of one parent: edited questions, or other answers. */
function switcher(node) {
  const all = childrenOf(node.parent).filter(({ role }) => role === node.role), at = all.indexOf(node);
  if (all.length < 2) return [];
  const step = (name, path, to) => {
    const button = tool("", path, async () => {
      if (running) return;
      conversation.leaf = newestBelow(all[to]).id;
      await keep("conversations", conversation);
      sticks = false;
      showBranch();
    });
    button.setAttribute("aria-label", name);
    button.disabled = !all[to];
    return button;
  };
  const what = node.role === "user" ? "question" : "answer";
  const place = make("span", "place", `${at + 1}/${all.length}`);
  return [step(`Earlier ${what}`, ICONS.left, at - 1), place, step(`Later ${what}`, ICONS.right, at + 1)];
}

function questionNode(node) {
  const article = make("article", "question", make("h3", "unseen", "You"));
  for (const entry of node.media) entry.url ||= URL.createObjectURL(entry.file);
  if (node.media.length) article.append(make("div", "media", ...node.media.map(shown)));
  if (node.text) article.append(make("div", "said", node.text));
  article.append(make("div", "under", ...switcher(node), tool("Edit", ICONS.edit, () => edit(node))));
  return article;
}

function answerNode(node) {
  const words = make("div", "words");
  const article = make("article", "answer", make("h3", "unseen", "Answer"), words);
  if (node.text.trim()) new Words(words).show(node.text);
  if (node.failure) {
    const box = make("div", "error", node.failure);
    box.setAttribute("role", "alert");
    article.append(box);
  }
  const below = make("div", "below", ...switcher(node));
  if (node.text) below.append(copier(() => node.text));
  below.append(tool("Again", ICONS.again, () => again(node)));
  const unfinished = ["stopped", "length", "interrupted"].includes(node.reason) || (node.failure && node.text);
  if (unfinished && node.text && !childrenOf(node.id).length) below.append(tool("Continue", ICONS.on, () => goOn(node)));
  below.append(make("span", "figures", figures(node.text, node.reason, node.usage)));
  article.append(below);
  return article;
}

function again(node) {
  if (running) return;
  sticks = true;
  conversation.leaf = node.parent;
  showBranch();
  answer(nodes.get(node.parent));
}

function goOn(node) {
  if (running) return;
  sticks = true;
  answer(nodes.get(node.parent), node);
}

function edit(node) {
  if (running) return;
  editing = node;
  $("editing").hidden = false;
  $("text").value = node.text;
  chosen = node.media.map(({ kind, file }) => ({ kind, file, url: URL.createObjectURL(file) }));
  showChosen();
  fit();
  $("text").focus();
}

function finishEditing() {
  editing = null;
  $("editing").hidden = true;
}

async function cancelEditing() {
  finishEditing();
  await showDraft();
  $("text").focus();
}

// Asking.

/** Answers a question with a new node, or goes on with an answer that is given. */
async function answer(asked, node = null) {
  running = new AbortController();
  const abort = running, within = conversation, known = nodes;
  ready();
  const begun = node?.text || "";
  const sent = await asMessages(asked);
  node ||= await addNode({ parent: asked.id, role: "assistant", text: "", reason: "interrupted" }, within, known);
  if (known === nodes) showBranch();
  const article = known === nodes ? $("log").lastChild : answerNode(node);
  const words = article.querySelector(".words"), wait = make("div", "wait", make("i"), make("i"), make("i"));
  article.querySelector(".below").remove();
  article.querySelector(".error")?.remove();
  wait.setAttribute("role", "status");
  wait.setAttribute("aria-label", "The model is reading");
  if (!begun) words.replaceChildren(wait);
  article.setAttribute("aria-busy", "true");
  if (sticks) toBottom();
  const view = new Words(words);
  let reason = null, drawn = 0, savedAt = Date.now();
  if (begun) words.replaceChildren();
  const draw = () => {
    drawn = 0;
    if (node.text.trim()) view.show(node.text);
    if (sticks && known === nodes) toBottom();
  };
  if (begun) draw();
  delete node.failure;
  if (begun) sent.push({ role: "assistant", content: begun });
  const { system, ...settings } = requestSettings();
  const body = {
    ...settings,
    messages: system ? [{ role: "system", content: system }, ...sent] : sent,
    stream: true,
    stream_options: { include_usage: true },
    ...(begun && { continue_final_message: true }),
  };
  try {
    words.classList.add("coming");
    const options = { method: "POST", body: JSON.stringify(body), signal: abort.signal };
    for await (const chunk of events(await call("/v1/chat/completions", options))) {
      node.usage = chunk.usage || node.usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      node.text += choice.delta.content || "";
      reason = choice.finish_reason || reason;
      drawn ||= requestAnimationFrame(draw);
      if (Date.now() - savedAt > 1000) {
        savedAt = Date.now();
        if (remembered.conversations.has(within.id)) keep("messages", { ...node, reason: "interrupted" }); // what a crash leaves
      }
    }
    if (!reason) throw new Refused(0, "The connection to the server broke.");
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else {
      node.failure = error instanceof Refused ? naming(error.message, pathTo(asked), system) : "The connection to the server broke.";
      if ([400, 413, 422].includes(error.status) && !begun) reason = "refused";
      if (error.status === 401) askForKey();
    }
  }
  cancelAnimationFrame(drawn);
  if (running === abort) running = null;
  node.reason = reason;
  if (remembered.conversations.has(within.id)) {
    await keep("messages", node);
    tellTabs();
  }
  if (known === nodes) showBranch();
  ready();
  showContext();
}

/** An error with the name of the file that it is about, in place of the file's place in the request. */
function naming(message, path, system) {
  return message.replace(/messages\[(\d+)\]\.content\[(\d+)\]/, (place, i, part) => {
    return path[i - (system ? 1 : 0)]?.media?.[part]?.file.name || place;
  });
}

function figures(text, reason, usage) {
  const said = [];
  if (reason === "stopped") said.push("stopped");
  if (reason === "interrupted") said.push("interrupted");
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

async function newChat() {
  stop();
  await openConversation(null);
}

// The draft: what is written and not yet sent survives a reload and a crash, one for each conversation and one for a new one.

const draftId = () => conversation?.id || "new";

async function saveDraft() {
  if (editing) return;
  if ($("text").value) await keep("drafts", { id: draftId(), text: $("text").value });
  else await write([], [["drafts", draftId()]]);
}

async function saveDraftMedia() {
  if (editing) return;
  const media = chosen.map(({ kind, file }) => ({ kind, file }));
  if (media.length) await keep("drafts", { id: `${draftId()}:media`, media });
  else await write([], [["drafts", `${draftId()}:media`]]);
}

async function showDraft() {
  finishEditing();
  const id = draftId(), text = await readDraft(id), media = await readDraft(`${id}:media`);
  $("text").value = text?.text || "";
  chosen = (media?.media || []).map(({ kind, file }) => ({ kind, file, url: URL.createObjectURL(file) }));
  showChosen();
  fit();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("text").addEventListener("input", () => {
  fit();
  ready();
  saveDraft();
});
$("text").addEventListener("keydown", (event) => {
  // On a phone's keyboard, Enter is the only way to a new line.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !matchMedia("(pointer: coarse)").matches) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !$("text").value && !chosen.length && !running) {
    const last = branch().findLast(({ role }) => role === "user");
    if (last) {
      event.preventDefault();
      edit(last);
    }
  }
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", newChat);
$("editing-end").addEventListener("click", cancelEditing);
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open], :popover-open")) {
    if (recorder) finishRecording(false);
    else if (running) stop();
    else if (editing) cancelEditing();
  } else if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    newChat();
  }
});
addEventListener("popstate", () => openConversation(location.hash.slice(1)));
