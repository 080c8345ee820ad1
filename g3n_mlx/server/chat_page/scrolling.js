// The page follows the words as they come, until the reader scrolls up.

let sticks = true;

function toBottom() {
  $("scroller").scrollTop = $("scroller").scrollHeight;
}

$("scroller").addEventListener("scroll", () => {
  const { scrollTop, scrollHeight, clientHeight } = $("scroller");
  sticks = scrollHeight - scrollTop - clientHeight < 60;
  $("latest").hidden = sticks;
  document.body.classList.toggle("scrolled", scrollTop > 4);
}, { passive: true });
$("latest").addEventListener("click", () => {
  sticks = true;
  toBottom();
});
