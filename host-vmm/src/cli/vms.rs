//! Which platform is asked, and what it is asked of single VMs.

use std::{net::SocketAddr, path::PathBuf, str::FromStr};

use clap::Args;

use super::{Where, copies, vm_name};

/// Which platform is asked.
#[derive(Debug, Args)]
pub(crate) struct Platform {
    /// The platform's socket; the only one that this user runs where none is named.
    #[arg(long, value_name = "SOCKET", env = "HOST_VMM_API")]
    pub(crate) api: Option<PathBuf>,
    /// Ask a platform over the network instead: its name, and the address where it serves others.
    #[arg(long, value_name = "NAME@ADDRESS", requires = "certificate")]
    pub(crate) at: Option<Elsewhere>,
    /// By whose certificate it is asked over the network: DIR holds NAME.pem, NAME.key and the cluster's
    /// ca.pem, as `host-vmm cert issue NAME --operator` leaves them.
    #[arg(long = "as", value_name = "DIR/NAME", env = "HOST_VMM_AS")]
    pub(crate) certificate: Option<PathBuf>,
}

/// A platform on another host, as `--at` names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Elsewhere {
    /// The name that its certificate must have.
    pub(crate) name: String,
    /// Where it serves others.
    pub(crate) address: SocketAddr,
}

impl FromStr for Elsewhere {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, address) =
            text.split_once('@').ok_or("must be NAME@ADDRESS, such as north@192.0.2.1:7070")?;
        let name = vm_name(name).map_err(|why| format!("the name {name:?} {why}"))?;
        let address = address
            .parse()
            .map_err(|_| format!("{address:?} is no address with a port, such as 192.0.2.1:7070"))?;
        Ok(Self { name, address })
    }
}

/// Options of `fork`.
#[derive(Debug, Args)]
pub(crate) struct Fork {
    /// The platform.
    #[command(flatten)]
    pub(crate) platform: Platform,
    /// Its name, or its ID, or how that begins.
    pub(crate) vm: String,
    /// How many copies.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = copies())]
    pub(crate) count: u32,
    /// Where they are to run.
    #[arg(long = "where", value_name = "PLACE", default_value = "any", value_enum)]
    pub(crate) location: Where,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `stop`.
#[derive(Debug, Args)]
pub(crate) struct Stop {
    /// The platform.
    #[command(flatten)]
    pub(crate) platform: Platform,
    /// Their names, or IDs, or how these begin.
    #[arg(value_name = "VM", required = true)]
    pub(crate) vms: Vec<String>,
}

/// Options of `logs`.
#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// The platform.
    #[command(flatten)]
    pub(crate) platform: Platform,
    /// Its name, or its ID, or how that begins. It may have ended.
    pub(crate) vm: String,
    /// Go on with what it writes, until it ends.
    #[arg(long, short)]
    pub(crate) follow: bool,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn a_platform_elsewhere_has_a_name_and_an_address() {
        let elsewhere =
            |name: &str, address: &str| Elsewhere { name: name.into(), address: address.parse().unwrap() };
        assert_eq!("north@192.0.2.1:7070".parse(), Ok(elsewhere("north", "192.0.2.1:7070")));
        assert_eq!("a@[2001:db8::1]:1".parse(), Ok(elsewhere("a", "[2001:db8::1]:1")));
        for bad in
            ["", "north", "@192.0.2.1:7070", "north@", "north@192.0.2.1", "No@192.0.2.1:1", "a@b@192.0.2.1:1"]
        {
            assert!(bad.parse::<Elsewhere>().is_err(), "{bad}");
        }
    }

    #[test]
    fn over_the_network_nobody_asks_without_a_certificate() {
        let parse = |more: &[&str]| {
            Cli::try_parse_from([&["host-vmm", "stop", "web.1", "--at", "a@[::1]:1"], more].concat())
        };
        assert!(parse(&[]).is_err());
        assert!(parse(&["--as", "certs/alice"]).is_ok());
    }
}
