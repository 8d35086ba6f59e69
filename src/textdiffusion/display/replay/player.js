// Plays a recording: on the page, and in a replay of its own, from the same text. No library, nothing fetched.
(() => {
  const escaped = (s) => s.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/"/g, "&quot;").replace(/'/g, "&#x27;");

  // Every step's rows of cells, from what each step changed; rows that stay are shared.
  function unfold(steps) {
    let rows = [];
    return steps.map((step) => (rows = step.rows.map((change, r) => {
      const [length, ...news] = change;
      const old = rows[r] || [];
      if (!news.length && old.length === length) return old;
      const row = old.slice(0, length);
      for (const [i, code, text] of news) row[i] = [code, text];
      return row;
    })));
  }

  // The same HTML as canvas.row_html: neighbours of one state share a span.
  function html(row) {
    let out = "", code = null, text = "";
    const close = () => { if (code !== null) out += `<span class="${code}">${escaped(text)}</span>`; };
    for (const [c, t] of row) {
      if (c !== code) { close(); code = c; text = ""; }
      text += t;
    }
    close();
    return out;
  }

  function save(name, type, body) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([body], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  async function copy(text) {
    try { await navigator.clipboard.writeText(text); return; } catch { /* not a secure page: the old way */ }
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }

  function plain(recording) {
    const many = recording.panels.length > 1;
    return recording.panels.map((p) => (many ? `## ${p.title}\n` : "") + p.texts.join("\n\n---\n\n")).join("\n\n") + "\n";
  }

  function start(root) {
    const original = root.outerHTML;
    root.dataset.ready = "1";
    const source = root.querySelector(".td-recording").textContent;
    const recording = JSON.parse(source);
    const shown = [...root.querySelectorAll(".td-panel")].map((panel) => ({
      status: panel.querySelector(".td-status"), bar: panel.querySelector(".td-bar > span"),
      rows: [...panel.querySelectorAll(".td-row")],
    }));
    const frames = recording.panels.map((p) => unfold(p.steps));
    const most = Math.max(...frames.map((f) => f.length)) - 1;
    const range = root.querySelector("input[type=range]"), where = root.querySelector(".td-where");
    const play = root.querySelector(".td-play");
    range.max = most;
    let timer = null;

    function show(k) {
      range.value = k;
      recording.panels.forEach((panel, p) => {
        const last = frames[p].length - 1, at = most ? Math.round((k / most) * last) : last, step = panel.steps[at];
        shown[p].status.textContent = step.status;
        shown[p].bar.style.width = `${last ? (100 * at) / last : 100}%`;
        shown[p].rows.forEach((element, r) => { element.innerHTML = html(frames[p][at][r]); });
      });
      where.textContent = `${k} / ${most}`;
      range.setAttribute("aria-valuetext", recording.panels.map((p, i) => shown[i].status.textContent).join("; "));
    }
    function halt() {
      if (timer) cancelAnimationFrame(timer);
      timer = null;
      play.textContent = "▶ Play";
    }
    function run(seconds) {
      const begin = performance.now(), first = Number(range.value) >= most ? 0 : Number(range.value);
      play.textContent = "❚❚ Pause";
      const tick = (now) => {
        if (!root.isConnected) return;
        // The time that the first tick is given may lie before begin.
        const k = Math.min(most, first + Math.max(0, Math.floor(((now - begin) / 1000 / seconds) * most)));
        if (k !== Number(range.value) || k === first) show(k);
        if (k < most) timer = requestAnimationFrame(tick); else halt();
      };
      timer = requestAnimationFrame(tick);
    }
    play.addEventListener("click", () => (timer ? halt() : run(4)));
    range.addEventListener("input", () => { halt(); show(Number(range.value)); });
    const act = (name, what) => root.querySelector(name)?.addEventListener("click", what);
    act(".td-copy", async (event) => {
      const button = event.currentTarget, was = button.textContent;
      await copy(plain(recording).trimEnd());
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = was; }, 1200);
    });
    act(".td-save-text", () => save("textdiffusion.txt", "text/plain", plain(recording)));
    act(".td-save-json", () => save("textdiffusion.json", "application/json", source));
    // A file of its own: the empty replay (canvas.replay_page of nothing) around this player as it came.
    act(".td-save-html", () => save("textdiffusion.html", "text/html", window.tdShell.replace("<!--" + "player-->", () => original)));
    if (!window.tdShell) root.querySelector(".td-save-html")?.remove();
    show(Math.round(Number(root.dataset.begin ?? 1) * most));
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    // What was written faster than an eye can follow is played once.
    if (most && !still && Number(root.dataset.play) > 0) { show(0); run(Number(root.dataset.play)); }
  }

  function scan() {
    for (const root of document.querySelectorAll(".td-player:not([data-ready])")) start(root);
  }
  new MutationObserver(scan).observe(document.documentElement, { childList: true, subtree: true });
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", scan); else scan();
})();
