//! Which platform a command asks.

use std::path::Path;

use anyhow::{Context, bail};
use api::client::Endpoint;
use cluster::{certificates::ca_certificate, tls::Credentials};

use crate::cli::{Elsewhere, Platform};

/// Where the platform is asked that the options name: `None` is the only one that this user runs.
pub(super) fn endpoint(options: &Platform) -> anyhow::Result<Option<Endpoint>> {
    let Some(Elsewhere { name, address }) = &options.at else {
        return Ok(options.api.clone().map(Endpoint::Socket));
    };
    let own =
        options.certificate.as_deref().context("--at needs --as: nobody is asked without a certificate")?;
    let ca = ca_certificate(own.parent().unwrap_or(Path::new("")));
    let credentials = Credentials::load(&ca, &own.with_extension("pem"), &own.with_extension("key"))?;
    Ok(Some(Endpoint::of_platform(name, *address, Some(&credentials))))
}

/// The same, for a question that names a file of the platform's host.
pub(super) fn endpoint_here(options: &Platform) -> anyhow::Result<Option<Endpoint>> {
    if let Some(Elsewhere { name, .. }) = &options.at {
        bail!(
            "the file would be one of the host of {name}, and is used for users of that host only: run this there, without --at"
        );
    }
    endpoint(options)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cluster::{
        certificates,
        principal::{Principal, Role},
    };

    #[test]
    fn an_operator_shows_a_certificate_elsewhere_and_none_here() {
        let folder = tempfile::tempdir().unwrap();
        certificates::init(folder.path(), false).unwrap();
        certificates::issue(folder.path(), &Principal::new("alice", Role::Operator).unwrap(), 1, false)
            .unwrap();
        let at = |certificate: &str| Platform {
            api: Some("/socket".into()),
            at: Some("north@192.0.2.1:7070".parse().unwrap()),
            certificate: Some(folder.path().join(certificate)),
        };
        let named = endpoint(&at("alice")).unwrap().unwrap();
        assert_eq!(named.to_string(), "192.0.2.1:7070 (north)");
        assert!(endpoint(&at("bob")).is_err());
        assert!(endpoint_here(&at("alice")).unwrap_err().to_string().contains("without --at"));
        let here = Platform { at: None, ..at("bob") };
        assert_eq!(endpoint_here(&here).unwrap().unwrap().to_string(), "/socket");
        assert!(endpoint(&Platform { api: None, ..here }).unwrap().is_none());
    }
}
