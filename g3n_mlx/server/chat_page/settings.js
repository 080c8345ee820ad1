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
