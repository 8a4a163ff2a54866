//! A running `host-vmm`, and what it reports.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use nix::{
    fcntl::{OFlag, open},
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    time::{ClockId, clock_gettime},
    unistd::{Pid, mkfifo},
};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    assets,
    network::{self, Host},
    process,
};

/// Time that a test waits while nothing happens. Guests in the lab are slow, and two tests run at a time.
pub const TIMEOUT: Duration = Duration::from_secs(180);

/// Time that it waits in all, though something happens: on a busy machine, what is right may take long.
const IN_ALL: Duration = Duration::from_secs(900);

/// How long a VM may stand still for a fork, where a test does not say it: on a busy machine, what is right
/// may take long.
const MAX_PAUSE_SECONDS: &str = "120";

/// How often it is looked whether one that tells nothing has ended.
const LOOK_AROUND: Duration = Duration::from_secs(1);

/// Name of the way for its events.
const EVENTS: &str = "events";

/// Name of the socket of each platform's API.
const SOCKET: &str = "api.sock";

/// A `host-vmm` that is about to start.
#[derive(Debug, Default)]
pub struct Vmm {
    /// What is booted; `None` for a platform without a VM of its own.
    kernel: Option<PathBuf>,
    arguments: Vec<String>,
    cmdline: String,
    /// How it is a platform of a cluster, in TOML.
    config: Option<String>,
    /// Where it runs; `None` for this machine itself.
    host: Option<Host>,
    /// Its standard output and standard error, where these are not nowhere and the test's.
    output: Option<[Stdio; 2]>,
    /// How much it logs, where it is not as much as usual.
    log_level: Option<&'static str>,
}

impl Vmm {
    /// Boots this kernel.
    pub fn kernel(kernel: &Path) -> Self {
        Self { kernel: Some(kernel.to_owned()), ..Self::default() }
    }

    /// Boots nothing: `host-vmm serve`.
    pub fn serve(config: &str) -> Self {
        Self::default().config(config)
    }

    /// Makes it a platform of a cluster.
    #[must_use]
    pub fn config(self, config: &str) -> Self {
        Self { config: Some(config.to_owned()), ..self }
    }

    /// Has it run on a host of its own.
    #[must_use]
    pub fn on(self, host: &Host) -> Self {
        Self { host: Some(host.clone()), ..self }
    }

    /// Gives it a standard output and a standard error.
    #[must_use]
    pub fn output(self, stdout: impl Into<Stdio>, stderr: impl Into<Stdio>) -> Self {
        Self { output: Some([stdout.into(), stderr.into()]), ..self }
    }

    /// Has it log all that is of a level, such as `debug`.
    #[must_use]
    pub fn log_level(self, level: &'static str) -> Self {
        Self { log_level: Some(level), ..self }
    }

    /// Boots Linux with an image, and runs a program with arguments in it.
    ///
    /// # Panics
    /// Where there are no assets.
    pub fn linux(image: &str, program: &[&str]) -> Self {
        Self::linux_kernel("vmlinuz", image, program)
    }

    /// As [`Vmm::linux`], with the lean kernel and the kernel module.
    ///
    /// # Panics
    /// Where there are no assets.
    pub fn lean(image: &str, program: &[&str]) -> Self {
        Self::linux_kernel("lean/vmlinuz", image, program)
    }

    fn linux_kernel(kernel: &str, image: &str, program: &[&str]) -> Self {
        let initrd = assets::path(image);
        let vmm = Self::kernel(&assets::path(kernel)).option("--initrd", &initrd.to_string_lossy());
        vmm.cmdline("quiet").cmdline(&format!("vmfork.start={}", program.join(",")))
    }

    /// Adds an option.
    #[must_use]
    pub fn option(mut self, name: &str, value: &str) -> Self {
        self.arguments.extend([name.to_owned(), value.to_owned()]);
        self
    }

    /// Adds an option that takes no value.
    #[must_use]
    pub fn flag(mut self, name: &str) -> Self {
        self.arguments.push(name.to_owned());
        self
    }

    /// Adds words to the kernel's command line.
    #[must_use]
    pub fn cmdline(mut self, words: &str) -> Self {
        self.cmdline.push_str(words);
        self.cmdline.push(' ');
        self
    }

    /// Starts it.
    ///
    /// # Errors
    /// Where `host-vmm` can't be started.
    pub fn start(self) -> anyhow::Result<Running> {
        let folder = TempDir::with_prefix("vmfork-test-")?;
        let fifo = folder.path().join(EVENTS);
        mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let host_vmm = assets::path("bin/host-vmm");
        let mut command = network::command(self.host.as_ref(), &host_vmm);
        command.arg(if self.kernel.is_some() { "run" } else { "serve" });
        if let Some(kernel) = &self.kernel {
            command.arg("--kernel").arg(kernel).args(["--cmdline", &self.cmdline]);
        }
        let logs = folder.path().join("logs");
        if let Some(config) = &self.config {
            let file = folder.path().join("platform.toml");
            let config = format!("events = \"{EVENTS}\"\nlog_dir = \"logs\"\napi = \"{SOCKET}\"\n{config}");
            std::fs::write(&file, config)?;
            command.arg("--config").arg(file);
        } else {
            command.arg("--events").arg(&fifo).arg("--log-dir").arg(logs);
            command.arg("--api").arg(folder.path().join(SOCKET));
            if !self.arguments.iter().any(|argument| argument == "--max-pause") {
                command.args(["--max-pause", MAX_PAUSE_SECONDS]);
            }
        }
        command.args(&self.arguments).stdin(Stdio::piped()).stdout(Stdio::null());
        if let Some([stdout, stderr]) = self.output {
            command.stdout(stdout).stderr(stderr);
        }
        if let Some(level) = self.log_level {
            command.env("HOST_VMM_LOG", level);
        }
        let mut process = command.spawn().with_context(|| format!("can't start {}", host_vmm.display()))?;
        let stdin = process.stdin.take();
        let (sender, events) = mpsc::channel();
        thread::spawn(move || {
            // Opening waits until the other side opens it for writing, or for ever where that never comes: so
            // on this thread.
            let Ok(fifo) = File::open(fifo) else { return };
            for line in BufReader::new(fifo).lines().map_while(Result::ok) {
                let event = serde_json::from_str(&line).unwrap_or(Value::Null);
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        Ok(Running { process, stdin, events, seen: Vec::new(), folder })
    }
}

/// A `host-vmm`. Dropping it ends it.
#[derive(Debug)]
pub struct Running {
    process: Child,
    stdin: Option<ChildStdin>,
    events: mpsc::Receiver<Value>,
    seen: Vec<Value>,
    folder: TempDir,
}

/// How a run ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit code of `host-vmm`; `None` where a signal ended it.
    pub code: Option<i32>,
    /// All events.
    pub events: Vec<Value>,
}

impl Running {
    /// Process of `host-vmm`.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The socket of its API.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join(SOCKET)
    }

    /// Processes of all nodes and warm VMs: what its zygote has started.
    ///
    /// # Errors
    /// Where `/proc` can't be read.
    pub fn nodes(&self) -> io::Result<Vec<u32>> {
        let mut nodes = Vec::new();
        for zygote in process::children(self.pid())? {
            nodes.extend(process::children(zygote)?);
        }
        Ok(nodes)
    }

    /// Waits for the next event that nobody has waited for yet.
    ///
    /// # Errors
    /// As [`Running::wait_for`].
    pub fn next_event(&mut self) -> anyhow::Result<Value> {
        self.events.recv_timeout(TIMEOUT).context("no further event: host-vmm has ended, or nothing happens")
    }

    /// Waits for the first event, from the start on, from which `pick` makes something.
    ///
    /// # Errors
    /// Where it does not come in time, or `host-vmm` ends before. The error tells the last lines of the
    /// consoles.
    pub fn wait_for<T>(
        &mut self,
        what: &str,
        mut pick: impl FnMut(&Value) -> Option<T>,
    ) -> anyhow::Result<T> {
        if let Some(found) = self.seen.iter().find_map(&mut pick) {
            return Ok(found);
        }
        let deadline = Instant::now() + IN_ALL;
        loop {
            match self.events.recv_timeout(TIMEOUT.min(deadline.saturating_duration_since(Instant::now()))) {
                Ok(event) => {
                    let found = pick(&event);
                    self.seen.push(event);
                    if let Some(found) = found {
                        return Ok(found);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!(
                        "no {what}: nothing happens in {TIMEOUT:?}, or not that in {IN_ALL:?}{}",
                        last_lines(&self.seen)
                    )
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("host-vmm ended before {what}{}", last_lines(&self.seen))
                }
            }
        }
    }

    /// Waits for a console line of some VM that starts with `prefix`, and returns the VM's name and the rest
    /// of the line.
    ///
    /// # Errors
    /// As [`Running::wait_for`].
    pub fn wait_for_line(&mut self, prefix: &str) -> anyhow::Result<(String, String)> {
        self.wait_for(&format!("line {prefix:?}"), |event| console_line(event, prefix))
    }

    /// Waits until `count` VMs have each printed a line that starts with `prefix`: name and rest of each, in
    /// the order in which they came.
    ///
    /// # Errors
    /// As [`Running::wait_for`].
    pub fn wait_for_lines(&mut self, prefix: &str, count: usize) -> anyhow::Result<Vec<(String, String)>> {
        let mut lines = Vec::new();
        self.wait_for(&format!("{count} lines {prefix:?} (so far {})", lines.len()), |event| {
            lines.extend(console_line(event, prefix));
            (lines.len() == count).then_some(())
        })?;
        Ok(lines)
    }

    /// Process of the node that holds the VM with this name.
    ///
    /// # Errors
    /// As [`Running::wait_for`].
    pub fn node(&mut self, name: &str) -> anyhow::Result<u32> {
        self.wait_for(&format!("VM {name}"), |event| {
            let pid =
                (event["event"] == "started" && event["name"] == name).then(|| event["pid"].as_u64())?;
            u32::try_from(pid?).ok()
        })
    }

    /// Types a line at the booted VM's console.
    ///
    /// # Errors
    /// Where `host-vmm` takes none.
    pub fn type_line(&mut self, line: &str) -> anyhow::Result<()> {
        self.type_bytes(format!("{line}\n").as_bytes())
    }

    /// Types any bytes.
    ///
    /// # Errors
    /// Where `host-vmm` takes none.
    pub fn type_bytes(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        Ok(self.stdin.as_mut().context("standard input is closed")?.write_all(bytes)?)
    }

    /// What a command of `host-vmm` that asks this platform prints.
    ///
    /// # Errors
    /// Where it fails.
    pub fn ask(&self, command: &[&str]) -> anyhow::Result<String> {
        let output = self.start(command)?.wait_with_output()?;
        anyhow::ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The ID of the image that is kept, where one is to be: of several forks, that of the last one takes the
    /// place of the others when it is sealed, which may be after the copies run.
    ///
    /// # Errors
    /// Where there is no such single image within [`TIMEOUT`], or `host-vmm` does not answer.
    pub fn kept_image(&self) -> anyhow::Result<String> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let images: Value = serde_json::from_str(&self.ask(&["image", "ls", "--json"])?)?;
            match images.as_array().map(Vec::as_slice) {
                Some([image]) if image["sealed"] == true => {
                    return Ok(image["id"].as_str().context("an image without an ID")?.to_owned());
                }
                _ => anyhow::ensure!(Instant::now() < deadline, "there is no single sealed image: {images}"),
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Starts a command of `host-vmm` that asks this platform.
    ///
    /// # Errors
    /// Where it can't be started.
    pub fn start(&self, command: &[&str]) -> io::Result<Child> {
        let mut program = Command::new(assets::path("bin/host-vmm"));
        program.args(command).arg("--api").arg(self.socket());
        program.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
    }

    /// Sends `host-vmm` a signal.
    ///
    /// # Errors
    /// Where it is gone.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        Ok(kill(Pid::from_raw(self.process.id().cast_signed()), signal)?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// Where it does not come in time.
    pub fn end(mut self) -> anyhow::Result<Ended> {
        let began = Instant::now();
        let mut latest = began;
        loop {
            if latest.elapsed() >= TIMEOUT || began.elapsed() >= IN_ALL {
                bail!(
                    "no end: nothing happens in {TIMEOUT:?}, or no end in {IN_ALL:?}{}",
                    last_lines(&self.seen)
                )
            }
            match self.events.recv_timeout(LOOK_AROUND) {
                Ok(event) => {
                    latest = Instant::now();
                    self.seen.push(event);
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    if self.process.try_wait()?.is_some() {
                        // It may have been killed before it has opened the way for its events, and somebody
                        // waits for that.
                        drop(open(
                            &self.folder.path().join(EVENTS),
                            OFlag::O_WRONLY | OFlag::O_NONBLOCK,
                            Mode::empty(),
                        ));
                    }
                }
            }
        }
        let status = self.process.wait()?;
        Ok(Ended { code: status.code(), events: std::mem::take(&mut self.seen) })
    }

    /// The log of a VM's console.
    ///
    /// # Errors
    /// Where there is none.
    pub fn log(&self, name: &str) -> anyhow::Result<String> {
        let path = self.folder.path().join("logs").join(format!("{name}.log"));
        std::fs::read_to_string(&path).with_context(|| format!("can't read {}", path.display()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Has no effect where it has ended.
        if let Err(error) = self.process.kill().and_then(|()| self.process.wait()) {
            eprintln!("host-vmm can't be ended: {error}");
        }
    }
}

impl Ended {
    /// All console lines that start with `prefix`: name of the VM, and the rest.
    pub fn lines(&self, prefix: &str) -> Vec<(String, String)> {
        self.events.iter().filter_map(|event| console_line(event, prefix)).collect()
    }

    /// The forks, as they were reported.
    pub fn forks(&self) -> Vec<&Value> {
        self.events.iter().filter(|event| event["event"] == "forked").collect()
    }

    /// How the VM with this name ended, as it was reported.
    pub fn how(&self, name: &str) -> Option<&Value> {
        let ended = self.events.iter().find(|event| event["event"] == "ended" && event["name"] == name);
        ended.map(|event| &event["how"])
    }
}

/// CLOCK_MONOTONIC in nanoseconds: the clock of the events.
///
/// # Panics
/// Where there is no such clock.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("a monotonic clock");
    u64::try_from(Duration::from(now).as_nanos()).expect("an uptime of less than 500 years")
}

/// The VM's name, and what follows `prefix`, where the event is such a line.
pub fn console_line(event: &Value, prefix: &str) -> Option<(String, String)> {
    let line = (event["event"] == "console").then(|| event["line"].as_str()).flatten()?;
    Some((event["name"].as_str()?.to_owned(), line.strip_prefix(prefix)?.to_owned()))
}

fn last_lines(events: &[Value]) -> String {
    let lines = events.iter().filter(|event| event["event"] == "console");
    let lines: Vec<String> = lines.map(|event| format!("\n  {}: {}", event["name"], event["line"])).collect();
    format!("; the last console lines:{}", lines[lines.len().saturating_sub(30)..].concat())
}
