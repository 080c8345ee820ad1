// Pictures, sound and videos.

const KINDS = { heic: "image", heif: "image", avif: "image", jxl: "image", opus: "audio", m4a: "audio", flac: "audio", mkv: "video", mov: "video" };
const WRITTEN = "txt md csv tsv json jsonl xml yaml yml toml ini log py js ts c h cpp rs go java rb sh sql html css tex".split(" ");
const LARGE = 2 << 20, LONGEST_SIDE = 1536; // twice what the vision tower looks at

function kindOf(file) {
  const kind = file.type.split("/")[0];
  const ending = file.name.split(".").pop().toLowerCase();
  if (["image", "audio", "video"].includes(kind) && ending !== "ts") return kind; // .ts is code here, not MPEG
  if (file.type === "application/pdf" || ending === "pdf" || kind === "text" || WRITTEN.includes(ending)) return "file";
  return KINDS[ending];
}

async function shrunk(file) {
  if (file.size < LARGE || !["image/jpeg", "image/png", "image/webp"].includes(file.type)) return file;
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) return file;
  const scale = LONGEST_SIDE / Math.max(bitmap.width, bitmap.height);
  if (scale >= 1) return file;
  const canvas = make("canvas");
  canvas.width = Math.round(bitmap.width * scale);
  canvas.height = Math.round(bitmap.height * scale);
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return (await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92))) || file;
}

function base64Of(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => failed(new Error("the file can't be read"));
    reader.readAsDataURL(blob);
  });
}

async function partOf({ kind, file }) {
  const blob = kind === "image" ? await shrunk(file) : file;
  const data = await base64Of(blob);
  if (kind === "audio") return { type: "input_audio", input_audio: { data, format: blob.type.split(/[/;]/)[1] || "wav" } };
  if (kind === "file") {
    const type = blob.type === "application/pdf" || /\.pdf$/i.test(file.name) ? "application/pdf" : "text/plain";
    return { type: "file", file: { filename: file.name, file_data: `data:${type};base64,${data}` } };
  }
  const url = `data:${blob.type || "application/octet-stream"};base64,${data}`;
  return kind === "image" ? { type: "image_url", image_url: { url } } : { type: "video_url", video_url: { url } };
}

function shown({ kind, file, url }) {
  if (kind === "file") return make("div", "chip", icon(ICONS.file), make("span", "", file.name));
  const node = make(kind === "image" ? "img" : kind);
  node.src = url;
  if (kind === "image") node.alt = file.name;
  else node.controls = true;
  node.setAttribute("aria-label", file.name);
  // What this browser can't show, the server may well read.
  node.addEventListener("error", () => {
    const chip = node.closest(".chip");
    chip?.classList.remove("picture");
    const instead = [icon(ICONS.file), make("span", "", file.name)];
    node.replaceWith(...(chip ? instead : [make("div", "chip", ...instead)]));
  });
  return node;
}

let chosen = [];

function choose(files) {
  const others = [];
  for (const file of files) {
    const kind = kindOf(file);
    if (kind) chosen.push({ kind, file, url: URL.createObjectURL(file) });
    else others.push(file.name);
  }
  notice(others.length ? `Neither picture, sound, video, text nor PDF: ${others.join(", ")}` : "");
  showChosen();
  saveDraftMedia();
  $("text").focus();
}

function showChosen() {
  $("chosen").hidden = !chosen.length;
  $("chosen").replaceChildren(...chosen.map((entry) => {
    const { kind, file, url } = entry;
    const away = make("button", "", icon(ICONS.cross));
    away.type = "button";
    away.setAttribute("aria-label", `Remove ${file.name}`);
    away.addEventListener("click", () => {
      chosen = chosen.filter((other) => other !== entry);
      URL.revokeObjectURL(url);
      showChosen();
      saveDraftMedia();
      $("text").focus();
    });
    const chip = kind === "image" ? make("div", "chip picture", shown(entry), away)
      : make("div", "chip", icon(ICONS[kind === "audio" ? "sound" : kind]), make("span", "", file.name), away);
    chip.title = file.name;
    return chip;
  }));
  ready();
}

$("attach").addEventListener("click", () => $("files").click());
$("files").addEventListener("change", () => {
  choose($("files").files);
  $("files").value = "";
});
$("text").addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    choose(event.clipboardData.files);
  }
});

let dragged = 0; // how many elements inside each other the pointer has entered
const bringsFiles = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
addEventListener("dragenter", (event) => { if (bringsFiles(event)) $("drop").hidden = ++dragged < 1; });
addEventListener("dragleave", (event) => { if (bringsFiles(event)) $("drop").hidden = --dragged < 1; });
addEventListener("dragover", (event) => { if (bringsFiles(event)) event.preventDefault(); });
addEventListener("drop", (event) => {
  if (!bringsFiles(event)) return;
  event.preventDefault();
  dragged = 0;
  $("drop").hidden = true;
  choose(event.dataTransfer.files);
});
