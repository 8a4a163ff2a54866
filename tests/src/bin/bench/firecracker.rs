//! The same guest, restored by Firecracker from a snapshot of it.
//!
//! The guest loops until it gets a byte on its console, and then answers by a line. So the time until its
//! first output is that until it runs, whoever has brought it to life.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use vmfork_tests::user_guest::{self, Order};

/// How long Firecracker may take to listen.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How often it is looked whether it does.
const INTERVAL: Duration = Duration::from_micros(50);

/// How long a guest has to dirty its memory and come to where it waits.
const SETTLE: Duration = Duration::from_secs(3);

/// A snapshot of the guest: 512 MiB, in the state in which a parent would fork.
#[derive(Debug)]
pub(crate) struct Snapshot {
    program: PathBuf,
    folder: TempDir,
}

impl Snapshot {
    /// Boots the guest in Firecracker, has it write to memory as `order` says, and takes a snapshot.
    pub(crate) fn new(program: &Path, order: Order) -> Result<Self> {
        let snapshot =
            Self { program: program.to_owned(), folder: TempDir::with_prefix("bench-firecracker-")? };
        let kernel = user_guest::kernel();
        let mut process = Process::start(&snapshot)?;
        process.put("/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": 512 }))?;
        process.put("/boot-source", &json!({ "kernel_image_path": kernel.path() }))?;
        process.put("/actions", &json!({ "action_type": "InstanceStart" }))?;
        process.wait_for_output().context("the guest does not start in Firecracker")?;
        process.stdin.write_all(&Order { count: 0, ..order }.to_bytes())?;
        thread::sleep(SETTLE);
        process.request("PATCH", "/vm", &json!({ "state": "Paused" }))?;
        let files =
            json!({ "snapshot_path": snapshot.path("state"), "mem_file_path": snapshot.path("memory") });
        process.put("/snapshot/create", &files)?;
        Ok(snapshot)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// From the start of the process to the guest's first output after it was told `what`.
    pub(crate) fn restore(&self, what: u8) -> Result<Duration> {
        let started = Instant::now();
        let mut process = Process::start(self)?;
        process.stdin.write_all(&[what])?;
        let memory = json!({ "backend_type": "File", "backend_path": self.path("memory") });
        let load = json!({ "snapshot_path": self.path("state"), "mem_backend": memory, "resume_vm": true });
        process.put("/snapshot/load", &load)?;
        process.wait_for_output().context("a restored guest says nothing")?;
        Ok(started.elapsed())
    }
}

/// A running Firecracker. Dropping it ends it.
#[derive(Debug)]
struct Process {
    child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
    api: UnixStream,
}

impl Process {
    fn start(snapshot: &Snapshot) -> Result<Self> {
        let socket = snapshot.path("api.sock");
        let mut command = Command::new(&snapshot.program);
        command.arg("--api-sock").arg(&socket).args(["--log-path", "/dev/null"]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("can't start {}", snapshot.program.display()))?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        match (connect(&socket), pipes) {
            (Ok(api), Some((stdin, stdout))) => {
                // The next one makes it anew.
                fs::remove_file(&socket)?;
                Ok(Self { child, stdin, stdout, api })
            }
            (api, _) => {
                child.kill()?;
                child.wait()?;
                api.map(drop).and_then(|()| bail!("Firecracker has no standard input or output"))
            }
        }
    }

    fn put(&mut self, path: &str, body: &Value) -> Result<()> {
        self.request("PUT", path, body)
    }

    /// Sends a request and waits for its answer: by hand, since what an HTTP library takes would be counted
    /// against Firecracker.
    fn request(&mut self, method: &str, path: &str, body: &Value) -> Result<()> {
        let body = body.to_string();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        );
        self.api.write_all((head + &body).as_bytes())?;
        let mut answer = vec![0; 64 << 10];
        let length = self.api.read(&mut answer)?;
        let answer = String::from_utf8_lossy(&answer[..length]);
        ensure!(answer.starts_with("HTTP/1.1 204"), "Firecracker answers to {method} {path}: {answer}");
        Ok(())
    }

    fn wait_for_output(&mut self) -> Result<()> {
        Ok(self.stdout.read_exact(&mut [0])?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("bench: Firecracker can't be ended: {error}");
        }
    }
}

/// Connects to a socket as soon as somebody listens there.
fn connect(socket: &Path) -> Result<UnixStream> {
    let started = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                ensure!(started.elapsed() < TIMEOUT, "Firecracker does not listen on {}", socket.display());
                thread::sleep(INTERVAL);
            }
            Err(error) => return Err(error.into()),
        }
    }
}
