/* Browsers start no worker for a page that was opened as a file, so there the search would do nothing. On such pages this
   runs the worker's script in a hidden frame of the same page instead, behind the part of the Worker interface in use. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.onmessage = this.onerror = null;
      const here = new URL(url, location.href);
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.ready = new Promise((resolve) => {
        frame.onload = () => {
          const scope = frame.contentWindow;
          const load = (address) =>
            new Promise((done, failed) => {
              const script = scope.document.createElement("script");
              script.src = new URL(address, here).href;
              script.onload = done;
              script.onerror = failed;
              scope.document.body.append(script);
            });
          // Scripts of a frame load later than a worker's would: callers may await what this returns.
          scope.importScripts = (...addresses) =>
            addresses.reduce((before, address) => before.then(() => load(address)), Promise.resolve());
          scope.postMessage = (data) => {
            const event = new MessageEvent("message", { data });
            this.dispatchEvent(event);
            if (this.onmessage) this.onmessage(event);
          };
          if (window.__index) scope.__index = window.__index;
          load(here).then(() => resolve(scope));
        };
      });
      frame.srcdoc = "<!doctype html><body></body>";
      const attach = () => document.body.append(frame);
      if (document.body) attach();
      else addEventListener("DOMContentLoaded", attach);
    }
    postMessage(data) {
      this.ready.then((scope) => scope.dispatchEvent(new scope.MessageEvent("message", { data })));
    }
    terminate() {}
  };
}
