//! Principals: name and role in a certificate of the cluster, and the peer at the other end of a connection.
//!
//! Name and role are the certificate's only DNS name: `NAME.platform.host-vmm.internal`, or
//! `NAME.operator.host-vmm.internal`. Such names are there to be compared (`internal` is set aside for
//! private use, and nobody resolves it): whoever connects gives an address, and the name that must answer
//! there. The role is a part of the name, so that an operator's certificate is never taken for a platform's.

use std::fmt;

use rustls::pki_types::{CertificateDer, ServerName};
use vmfork_abi::is_vm_type;
use webpki::EndEntityCert;

/// What all names end with.
const DOMAIN: &str = "host-vmm.internal";

/// Role of a principal in the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// A host that runs VMs.
    Platform,
    /// Somebody who asks platforms for things.
    Operator,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Platform => "platform",
            Self::Operator => "operator",
        })
    }
}

/// Principal: the holder of a certificate, by name and role.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Principal {
    name: String,
    role: Role,
}

impl Principal {
    /// A principal of this name, which must be valid by [`is_vm_type`], as a type's is: it is a part of a DNS
    /// name.
    pub fn new(name: &str, role: Role) -> Option<Self> {
        is_vm_type(name).then(|| Self { name: name.to_owned(), role })
    }

    /// Its name: unique among those of its role.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The name that its certificate has.
    pub(super) fn dns_name(&self) -> String {
        format!("{}.{}.{DOMAIN}", self.name, self.role)
    }

    /// The same, as the one that must answer.
    pub(super) fn server_name(&self) -> Option<ServerName<'static>> {
        ServerName::try_from(self.dns_name()).ok()
    }

    /// The principal that has this name in its certificate.
    pub(super) fn from_dns_name(text: &str) -> Option<Self> {
        let (name, rest) = text.split_once('.')?;
        let (label, domain) = rest.split_once('.')?;
        let role = [Role::Platform, Role::Operator].into_iter().find(|role| role.to_string() == label)?;
        if domain == DOMAIN { Self::new(name, role) } else { None }
    }

    /// The principal of a certificate; none where it has another name than ours, or several. Whose signature
    /// it has is not looked at.
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let certificate = EndEntityCert::try_from(certificate).ok()?;
        let mut names = certificate.valid_dns_names();
        let (Some(name), None) = (names.next(), names.next()) else { return None };
        let principal = Self::from_dns_name(name)?;
        // What it would be taken for where it answers, it is where it asks too.
        certificate.verify_is_valid_for_subject_name(&principal.server_name()?).ok()?;
        Some(principal)
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the {} {}", self.role, self.name)
    }
}

/// Peer of a connection: who is at its other end.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ConnectionPeer {
    /// The holder of a certificate of this cluster, which was verified.
    Certified(Principal),
    /// Somebody on this host, of whom nothing else is known: over a UNIX socket that only some users can
    /// reach, or a loopback address that all can.
    Local,
}

impl fmt::Display for ConnectionPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Certified(principal) => principal.fmt(f),
            Self::Local => f.write_str("somebody on this host"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn certificate(names: &[&str]) -> CertificateDer<'static> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let params = CertificateParams::new(names).unwrap();
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().into()
    }

    #[test]
    fn a_certificate_tells_name_and_role() {
        let principal = |name| Principal::of(&certificate(&[name])).unwrap();
        assert_eq!(
            principal("alpha.platform.host-vmm.internal"),
            Principal::new("alpha", Role::Platform).unwrap()
        );
        assert_eq!(
            principal("alice.operator.host-vmm.internal"),
            Principal::new("alice", Role::Operator).unwrap()
        );
    }

    #[test]
    fn a_certificate_with_another_name_is_nobodys() {
        let bad: [&[&str]; 10] = [
            &[],
            &["alpha"],
            &["platform.host-vmm.internal"],
            &["alpha.king.host-vmm.internal"],
            &["alpha.platform.host-vmm.example"],
            &["alpha.platform.host-vmm.internal.example"],
            &["north.alpha.platform.host-vmm.internal"],
            &["*.platform.host-vmm.internal"],
            &["Alpha.platform.host-vmm.internal"],
            &["alpha.platform.host-vmm.internal", "beta.platform.host-vmm.internal"],
        ];
        for names in bad {
            assert_eq!(Principal::of(&certificate(names)), None, "{names:?}");
        }
    }

    proptest! {
        #[test]
        fn each_name_of_a_holder_can_be_verified(name in "[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", operator: bool) {
            let role = if operator { Role::Operator } else { Role::Platform };
            let principal = Principal::new(&name, role).unwrap();
            prop_assert!(principal.server_name().is_some());
            prop_assert_eq!(Principal::from_dns_name(&principal.dns_name()), Some(principal));
        }

        #[test]
        fn a_damaged_certificate_is_anothers_or_nobodys(at: prop::sample::Index, byte: u8) {
            let mut bytes = certificate(&["alpha.platform.host-vmm.internal"]).to_vec();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Some(principal) = Principal::of(&CertificateDer::from(bytes)) {
                prop_assert!(is_vm_type(principal.name()));
            }
        }
    }
}
