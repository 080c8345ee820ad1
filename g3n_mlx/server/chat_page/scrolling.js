// The page follows the words as they come, until the reader scrolls up.

let sticks = true;

function toBottom() {
  $("scroller").scrollTop = $("scroller").scrollHeight;
}

let wasAt = 0;

$("scroller").addEventListener("scroll", () => {
  const { scrollTop, scrollHeight, clientHeight } = $("scroller");
  // Only the reader scrolls up; words that came since the page scrolled itself put the end further down.
  sticks = scrollHeight - scrollTop - clientHeight < 60 || (sticks && scrollTop >= wasAt);
  wasAt = scrollTop;
  $("latest").hidden = sticks;
  document.body.classList.toggle("scrolled", scrollTop > 4);
}, { passive: true });
new ResizeObserver(() => { if (sticks) toBottom(); }).observe($("log")); // a picture, too, takes its place late
$("latest").addEventListener("click", () => {
  sticks = true;
  toBottom();
});
