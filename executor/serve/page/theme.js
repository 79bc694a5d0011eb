// Before the first paint: the colours that were chosen here earlier. Without a choice the system's hold.
const savedTheme = (() => {
  try {
    return localStorage.getItem("theme");
  } catch {
    return null; // storage is turned off
  }
})();
if (savedTheme === "dark" || savedTheme === "light") document.documentElement.dataset.theme = savedTheme;
