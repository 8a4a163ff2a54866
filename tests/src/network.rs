//! Hosts of their own on a network of their own: network namespaces that a bridge joins, with cables that can
//! be pulled.
//!
//! They need no root: a user namespace owns them. All of it is gone with the last process in it.

use std::{
    ffi::OsStr,
    io::{self, Read, Write},
    net::Ipv4Addr,
    process::{Child, Command, Stdio},
    sync::Arc,
};

use anyhow::{Context, ensure};

/// The hosts' addresses are in 192.0.2.0/24, of which this is the last byte of the first one's.
const FIRST_ADDRESS: u8 = 1;

/// What a namespace is held by: it says when it is there, and goes on until its input ends, with its test at
/// the latest.
const HOLD: [&str; 3] = ["sh", "-c", "echo && exec cat"];

/// A switch, and the hosts that are connected to it, each by a cable of its own.
#[derive(Debug)]
pub struct Network {
    switch: Holder,
    hosts: Vec<Host>,
}

/// One host. Whoever has a copy of it keeps its namespace.
#[derive(Debug, Clone)]
pub struct Host {
    name: &'static str,
    address: Ipv4Addr,
    holder: Arc<Holder>,
}

/// The process that a namespace is entered by. Dropping it ends it.
#[derive(Debug)]
struct Holder(Child);

impl Network {
    /// One with hosts so called; `None` where this machine has or permits no namespaces, bridges or cables,
    /// which is told past what tests capture.
    ///
    /// # Panics
    /// Where it has them, and they can't be put together.
    pub fn start(names: &[&'static str]) -> Option<Self> {
        match Self::try_start(names) {
            Ok(network) => Some(network),
            Err(error) => {
                let told =
                    writeln!(io::stderr(), "SKIPPED: there can't be network namespaces here: {error:#}");
                told.expect("standard error");
                None
            }
        }
    }

    fn try_start(names: &[&'static str]) -> anyhow::Result<Self> {
        let mut unshare = Command::new("unshare");
        let switch = Holder::start(unshare.args(["--user", "--map-root-user", "--net"]).args(HOLD))?;
        switch.ip("link add name switch type bridge")?;
        switch.ip("link set dev switch up").expect("a switch");
        let connect = |(name, last): (&&'static str, u8)| Host::connect(name, last, &switch);
        let hosts = names.iter().zip(FIRST_ADDRESS..).map(connect).collect::<Result<_, _>>()?;
        Ok(Self { switch, hosts })
    }

    /// The host of this name.
    ///
    /// # Panics
    /// Where there is none.
    pub fn host(&self, name: &str) -> &Host {
        self.hosts.iter().find(|host| host.name == name).expect("a host")
    }

    /// Pulls the cable of a host: nothing gets through, and nobody is told.
    ///
    /// # Panics
    /// Where it can't be done.
    pub fn pull(&self, name: &str) {
        self.switch.ip(&format!("link set dev {name} down")).expect("a cable");
    }

    /// Plugs it in again.
    ///
    /// # Panics
    /// Where it can't be done.
    pub fn plug(&self, name: &str) {
        self.switch.ip(&format!("link set dev {name} up")).expect("a cable");
    }
}

impl Host {
    /// Makes one, and connects it to a switch, whose end of the cable has the host's name.
    fn connect(name: &'static str, last: u8, switch: &Holder) -> anyhow::Result<Self> {
        let holder = Holder::start(switch.enter(&["--user"], "unshare").arg("--net").args(HOLD))?;
        let address = Ipv4Addr::new(192, 0, 2, last);
        switch.ip(&format!("link add name {name} type veth peer name eth0 netns {}", holder.0.id()))?;
        switch.ip(&format!("link set dev {name} master switch up")).expect("a cable in a switch");
        for line in
            ["link set dev lo up", &format!("address add {address}/24 dev eth0"), "link set dev eth0 up"]
        {
            holder.ip(line).expect("a cable in a host");
        }
        Ok(Self { name, address, holder: Arc::new(holder) })
    }

    /// Its address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }
}

/// A command that runs on a host, or else on this machine itself.
pub(crate) fn command(host: Option<&Host>, program: impl AsRef<OsStr>) -> Command {
    match host {
        Some(host) => host.holder.enter(&["--user", "--net"], program),
        None => Command::new(program),
    }
}

impl Holder {
    /// Has a command hold a namespace, and waits until it is there.
    fn start(command: &mut Command) -> anyhow::Result<Self> {
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut holder = Self(piped.spawn().with_context(|| format!("can't run {}", shown(command)))?);
        let said = holder.0.stdout.as_mut().context("standard output")?.read(&mut [0])?;
        if said == 0 {
            let mut why = String::new();
            holder.0.stderr.as_mut().context("standard error")?.read_to_string(&mut why)?;
            anyhow::bail!("{}: {}", shown(command), why.trim());
        }
        Ok(holder)
    }

    /// A command that runs in some of the holder's namespaces. It is the process that is started.
    fn enter(&self, namespaces: &[&str], program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg("--target").arg(self.0.id().to_string()).args(namespaces);
        command.arg("--preserve-credentials").arg("--").arg(program);
        command
    }

    /// Has `ip` do something here.
    fn ip(&self, line: &str) -> anyhow::Result<()> {
        let mut ip = self.enter(&["--user", "--net"], "ip");
        let done = ip.args(line.split(' ')).output().context("can't run nsenter")?;
        ensure!(done.status.success(), "ip {line}: {}", String::from_utf8_lossy(&done.stderr).trim());
        Ok(())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        if let Err(error) = self.0.kill().and_then(|()| self.0.wait()) {
            eprintln!("a namespace can't be let go of: {error}");
        }
    }
}

fn shown(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}
