// Settings.

function showTemperature() {
  const set = kept("temperature"), words = set && Number(set).toFixed(1);
  $("temperature").value = set || "1";
  $("temperature-shown").textContent = words || "the model's own";
  $("temperature-now").textContent = words ? `Temperature ${words}` : "Settings";
  $("temperature-reset").hidden = !set;
}

$("temperature").addEventListener("input", () => {
  kept("temperature", $("temperature").value);
  showTemperature();
});
$("temperature-reset").addEventListener("click", () => {
  kept("temperature", "");
  showTemperature();
});
$("system").value = kept("system");
$("system").addEventListener("input", () => kept("system", $("system").value));

function showTheme(theme) {
  document.documentElement.dataset.theme = theme;
  for (const choice of document.getElementsByName("theme")) choice.checked = choice.value === theme;
}

for (const choice of document.getElementsByName("theme")) {
  choice.addEventListener("change", () => {
    kept("theme", choice.value);
    showTheme(choice.value);
  });
}
$("settings").addEventListener("toggle", (event) => $("settings-button").setAttribute("aria-expanded", event.newState === "open"));

const NUMBERS = ["top_p", "top_k", "min_p", "seed", "max_tokens"];

for (const name of NUMBERS) {
  $(name).value = kept(name);
  $(name).addEventListener("input", () => kept(name, $(name).value));
}
$("json").checked = kept("json") === "yes";
$("json").addEventListener("change", () => kept("json", $("json").checked ? "yes" : ""));
$("model-id").addEventListener("change", () => {
  kept("model-id", $("model-id").value);
  showSlice();
});

/** The settings as fields of a request; what is not set is left to the model. */
function requestSettings() {
  const temperature = kept("temperature"), system = $("system").value.trim();
  const numbers = NUMBERS.filter((name) => $(name).value && $(name).checkValidity()).map((name) => [name, Number($(name).value)]);
  return {
    model: $("model-id").value || "default",
    ...(temperature && { temperature: Number(temperature) }),
    ...Object.fromEntries(numbers),
    ...($("json").checked && { response_format: { type: "json_object" } }),
    ...(system && { system }),
  };
}

let modelIds = [];

function showModels(ids) {
  modelIds = ids;
  const options = ["", ...ids.slice(1)].map((id) => {
    const option = make("option", "", id || ids[0]);
    option.value = id;
    return option;
  });
  $("model-id").replaceChildren(...options);
  $("model-id").value = ids.includes(kept("model-id")) ? kept("model-id") : "";
  $("model-field").hidden = ids.length < 2;
  showSlice();
}

/** Which part of the model answers, where there are several. */
function showSlice() {
  const [name] = modelIds, ofModel = (id) => id.startsWith(`${name}:`), id = $("model-id").value || modelIds.find(ofModel) || name;
  const slice = ofModel(id) ? id.slice(name.length + 1) : id;
  $("slice").hidden = id === name;
  $("slice").textContent = slice === "whole" ? "full size" : slice;
  $("slice").title = slice === "whole" ? "The full model answers, none of its MatFormer slices" : ofModel(id)
    ? `The MatFormer slice ${slice} answers: a smaller model within ${name}` : `The model ${slice} answers`;
}

/** How much of the context the shown branch leaves, as the last answer's usage says. */
function showContext() {
  const usage = branch().findLast((node) => node.usage)?.usage;
  const left = contextTokens - (usage?.total_tokens || 0);
  $("context").hidden = !usage || !contextTokens;
  $("context").textContent = `${Math.max(0, left).toLocaleString("en")} of ${contextTokens.toLocaleString("en")} tokens left`;
}

// What to try, of what the model can do; a click writes it, and asks for the picture or the sound that it is about.

function showSuggestions({ vision, audio, video }) {
  const brings = [vision && "a picture", audio && "a sound", video && "a video", "a file"].filter(Boolean);
  const media = `${brings.slice(0, -1).join(", ")}${brings.length > 1 ? " or " : ""}${brings.at(-1)}`;
  $("brings").textContent = `Ask something, add ${media}${audio ? ", or say it" : ""}.`;
  $("greeting").textContent = vision ? "What shall we look at?" : "What shall we talk about?";
  $("record").hidden = !audio;
  const write = (text, then) => tool(text, ICONS.right, () => {
    $("text").value = text;
    fit();
    ready();
    saveDraft();
    then();
  });
  const tries = [write("What is 12 + 34?", () => $("text").focus())];
  if (vision) tries.push(write("What is in this picture?", () => $("files").click()));
  if (audio) tries.push(write("Transcribe this.", navigator.mediaDevices ? record : () => $("files").click()));
  if (video) tries.push(write("What happens in this video?", () => $("files").click()));
  $("suggestions").replaceChildren(...tries);
}
