// Conversations in this browser's IndexedDB. A conversation is a record with a title, its messages are a tree of records: each
// names its parent, so that an edited question or another answer is one more child, and nothing is overwritten. A browser that
// keeps nothing (a private window, a full disk) leaves them in memory until the page is closed.

const STORES = { conversations: "id", messages: "id", drafts: "id" };
const MOST_BYTES = 1 << 30; // of pictures, sound and videos; what is beyond is not kept
let database = null;

// Every conversation's record; of messages and drafts what the database did not take.
const remembered = Object.fromEntries(Object.keys(STORES).map((store) => [store, new Map()]));

const newId = () => [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(36).padStart(2, "0")).join("");

function settled(request) {
  return new Promise((done, failed) => {
    request.onsuccess = () => done(request.result);
    request.onerror = () => failed(request.error);
  });
}

async function openStore() {
  try {
    const request = indexedDB.open("g3n_mlx", 1);
    request.onupgradeneeded = () => {
      for (const [store, keyPath] of Object.entries(STORES)) request.result.createObjectStore(store, { keyPath });
      request.transaction.objectStore("messages").createIndex("conversation", "conversation");
    };
    database = await settled(request);
    for (const record of await readConversations()) remembered.conversations.set(record.id, record);
    navigator.storage?.persist?.().catch(() => false);
  } catch {
    database = null;
  }
}

const readConversations = () => settled(database.transaction("conversations").objectStore("conversations").getAll());

/**
 * Writes records and removes others, each with the name of its store, in one transaction: a crash leaves all of it or nothing.
 * Media are blobs, which IndexedDB takes as they are. What the browser does not take stays in memory.
 */
async function write(records, removed = []) {
  for (const [store, record] of records) remembered[store].set(record.id, record);
  for (const [store, id] of removed) remembered[store].delete(id);
  if (!database) return;
  try {
    const transaction = database.transaction(Object.keys(STORES), "readwrite", { durability: "strict" });
    const written = new Promise((done, failed) => {
      transaction.oncomplete = done;
      transaction.onabort = () => failed(transaction.error);
    });
    for (const [store, record] of records) transaction.objectStore(store).put(record);
    for (const [store, id] of removed) transaction.objectStore(store).delete(id);
    await written;
  } catch (error) {
    notice(error?.name === "QuotaExceededError"
      ? "The browser's storage is full. What you write from now on is lost when this tab is closed: delete some conversations, or export this one."
      : `The browser could not keep this (${error?.name || "error"}). It is lost when this tab is closed: export the conversation.`);
    return;
  }
  for (const [store, record] of records) {
    if (store !== "conversations" && remembered[store].get(record.id) === record) remembered[store].delete(record.id);
  }
}

const keep = (store, record) => write([[store, record]]);

async function readDraft(id) {
  const draft = remembered.drafts.get(id);
  return draft || !database ? draft : settled(database.transaction("drafts").objectStore("drafts").get(id));
}

/** The database's messages, all or those of one conversation, with what it did not take. */
async function everyMessage(conversation) {
  const found = new Map();
  if (database) {
    const store = database.transaction("messages").objectStore("messages");
    const stored = await settled(conversation ? store.index("conversation").getAll(conversation) : store.getAll());
    for (const message of stored) found.set(message.id, message);
  }
  for (const message of remembered.messages.values()) {
    if (!conversation || message.conversation === conversation) found.set(message.id, message);
  }
  return [...found.values()].sort((a, b) => a.order - b.order);
}

const draftsOf = (id) => [["drafts", id], ["drafts", `${id}:media`]];

async function dropConversation(id) {
  const messages = (await everyMessage(id)).map((message) => ["messages", message.id]);
  await write([], [...messages, ...draftsOf(id), ["conversations", id]]);
  await writeRemembered();
}

/** Tries once more what the database did not take: there may be room now. */
async function writeRemembered() {
  const unwritten = ["messages", "drafts"].flatMap((store) => [...remembered[store].values()].map((record) => [store, record]));
  if (unwritten.length) await write([...unwritten, ...[...remembered.conversations.values()].map((record) => ["conversations", record])]);
}

async function dropEverything() {
  for (const store of Object.keys(STORES)) {
    remembered[store].clear();
    if (database) await settled(database.transaction(store, "readwrite").objectStore(store).clear());
  }
}

function bytesOf(messages) {
  return messages.flatMap(({ media }) => media || []).reduce((sum, { file }) => sum + file.size, 0);
}
