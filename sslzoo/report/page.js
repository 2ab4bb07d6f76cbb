// A click on a heading sorts by that column; empty cells stay at the end.
for (const head of document.querySelectorAll("th"))
  head.onclick = () => {
    const body = head.closest("table").tBodies[0], up = head.ariaSort === "descending";
    const key = (row) => row.cells[head.cellIndex].dataset.v ?? row.cells[head.cellIndex].textContent;
    const order = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b) * (up ? 1 : -1);
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.ariaSort = up ? "ascending" : "descending";
    const rows = [...body.rows].sort((a, b) => !key(a) - !key(b) || order(key(a), key(b)));
    body.append(...rows);
  };
