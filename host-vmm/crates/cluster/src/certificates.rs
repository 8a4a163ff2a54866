//! The certificates of a cluster: its own CA, and what that has signed.
//!
//! ```text
//! ca.pem  ca.key        the CA: everybody has the certificate, and only whoever issues certificates has the key
//! NAME.pem  NAME.key    a platform's or an operator's
//! ```
//!
//! A cluster believes in no other CA than its own, so whoever has a certificate of it is a member. Keys are
//! ECDSA's on P-256: fast enough not to matter, and what every TLS library and hardware module takes, where
//! Ed25519 still is not everywhere.
//!
//! The CA's name is made of its key. So the key is all that it takes to issue a certificate, and no two
//! clusters' CAs are mistaken for each other. Verifiers look at a CA's key and name, not at its dates, which
//! are for people and other tools: what ends is each certificate.
//!
//! Nobody can take a certificate back. It is short-lived instead, or the cluster gets another CA: `ca.pem`
//! may hold several.

use std::{
    fs::{self, DirBuilder, Permissions},
    io::{self, Write},
    ops::Range,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tempfile::NamedTempFile;
use time::{Date, Duration, OffsetDateTime};
use types::new_id;

use super::{
    principal::Principal,
    tls::{self, Credentials},
};

/// Name of the CA's files.
const CA: &str = "ca";

/// How long a CA is valid: ten years.
const CA_DAYS: u32 = 3653;

/// How much earlier than now a certificate is valid, for hosts whose clocks are late.
const CLOCK_SKEW: Duration = Duration::hours(1);

/// Digits of the key's digest in a CA's name.
const CA_DIGITS: usize = 16;

/// Mode of a key's file.
const KEY_MODE: u32 = 0o600;

/// Mode of a certificate's file, less what the process's mask takes away.
const CERTIFICATE_MODE: u32 = 0o644;

/// Why certificates can't be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The files would be the CA's.
    #[error("{CA}.pem and {CA}.key are the CA's own files: choose another name")]
    Reserved,
    /// Nothing is overwritten by mistake.
    #[error("{} is there already; --force replaces it", .path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A file or folder can't be written.
    #[error("can't write {}", .path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The CA's files can't be read.
    #[error("can't use the CA's files (`host-vmm cert init` makes them)")]
    Ca(#[source] tls::Error),
    /// The CA's key is none of those that this program makes.
    #[error("can't use the CA's key in {}", .path.display())]
    CaKey {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: rcgen::Error,
    },
    /// Nobody would take it.
    #[error("what {CA}.key in {} signs is not valid for {CA}.pem there: they don't belong together", .folder.display())]
    Mismatch {
        /// The folder.
        folder: PathBuf,
        /// What is wrong with it.
        source: tls::Error,
    },
    /// There is no serial number for it.
    #[error("can't draw a serial number")]
    Serial(#[source] io::Error),
    /// It can't be made.
    #[error("can't make a key and a certificate")]
    Make(#[source] rcgen::Error),
}

/// A certificate and its key that were written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// File of the certificate.
    pub certificate: PathBuf,
    /// File of its key.
    pub key: PathBuf,
    /// The last day on which it is valid (UTC).
    pub until: Date,
}

/// Makes a CA: `ca.pem` and `ca.key` in a folder, which is made if it is not there.
///
/// # Errors
/// [`Error`]. Without `force`, a CA that is there stays.
pub fn init(folder: &Path, force: bool) -> Result<Written, Error> {
    let (validity, authority) = (from_now(CA_DAYS), Authority::generate()?);
    let certificate = authority.certificate(&validity)?;
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|source| Error::Write { path: folder.to_owned(), source })?;
    let (certificate, key) = write(folder, CA, &certificate, &authority.0, force)?;
    Ok(Written { certificate, key, until: validity.end.date() })
}

/// Issues a certificate for so many days: `NAME.pem` and `NAME.key`, in the folder of the CA. It is good for
/// connecting, and for being connected to.
///
/// # Errors
/// [`Error`]. Without `force`, a certificate or key that is there stays.
pub fn issue(folder: &Path, principal: &Principal, days: u32, force: bool) -> Result<Written, Error> {
    if principal.name() == CA {
        return Err(Error::Reserved);
    }
    let validity = from_now(days);
    let pair = Authority::load(folder)?.issue(principal, &validity)?;
    let trusted = tls::read_certificates(&ca_certificate(folder)).map_err(Error::Ca)?;
    let checked = pair.credentials(&trusted).and_then(Credentials::checked);
    checked.map_err(|source| Error::Mismatch { folder: folder.to_owned(), source })?;
    let (certificate, key) = write(folder, principal.name(), &pair.certificate, &pair.key, force)?;
    Ok(Written { certificate, key, until: validity.end.date() })
}

/// The file of the CA's certificate in a folder.
pub fn ca_certificate(folder: &Path) -> PathBuf {
    folder.join(format!("{CA}.pem"))
}

fn from_now(days: u32) -> Range<OffsetDateTime> {
    let now = OffsetDateTime::now_utc();
    now - CLOCK_SKEW..now + Duration::days(days.into())
}

/// A CA: its key, for all else follows from that.
#[derive(Debug)]
pub(super) struct Authority(KeyPair);

impl Authority {
    /// A new one.
    pub(super) fn generate() -> Result<Self, Error> {
        new_key().map(Self)
    }

    /// The one whose key is in a folder.
    fn load(folder: &Path) -> Result<Self, Error> {
        let path = folder.join(format!("{CA}.key"));
        let key = tls::read_key(&path).map_err(Error::Ca)?;
        KeyPair::try_from(&key).map(Self).map_err(|source| Error::CaKey { path, source })
    }

    fn name(&self) -> String {
        let digest = blake3::hash(self.0.public_key_raw()).to_hex();
        format!("host-vmm cluster {}", &digest[..CA_DIGITS])
    }

    /// Its own certificate, which signs those of holders, and no other CA's.
    pub(super) fn certificate(&self, validity: &Range<OffsetDateTime>) -> Result<Certificate, Error> {
        let mut params = params(self.name(), Vec::new(), validity)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.self_signed(&self.0).map_err(Error::Make)
    }

    /// Makes a key, and a certificate for its holder.
    pub(super) fn issue(
        &self,
        principal: &Principal,
        validity: &Range<OffsetDateTime>,
    ) -> Result<Pair, Error> {
        let mut params = params(principal.dns_name(), vec![principal.dns_name()], validity)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(&params)
    }

    pub(super) fn sign(&self, params: &CertificateParams) -> Result<Pair, Error> {
        let mut own = CertificateParams::default();
        own.distinguished_name = named(self.name());
        let key = new_key()?;
        let certificate = params.signed_by(&key, &Issuer::new(own, &self.0)).map_err(Error::Make)?;
        Ok(Pair { certificate, key })
    }
}

/// A certificate and its key.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) certificate: Certificate,
    pub(super) key: KeyPair,
}

impl Pair {
    /// The same, for somebody who believes in these CAs.
    pub(super) fn credentials(&self, trusted: &[CertificateDer<'static>]) -> Result<Credentials, tls::Error> {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        Credentials::new(trusted, vec![self.certificate.der().clone()], &key)
    }
}

fn new_key() -> Result<KeyPair, Error> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(Error::Make)
}

fn named(name: String) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// What all certificates have.
fn params(
    name: String,
    dns_names: Vec<String>,
    validity: &Range<OffsetDateTime>,
) -> Result<CertificateParams, Error> {
    let mut params = CertificateParams::new(dns_names).map_err(Error::Make)?;
    params.distinguished_name = named(name);
    (params.not_before, params.not_after) = (validity.start, validity.end);
    params.serial_number = Some(SerialNumber::from_slice(new_id().map_err(Error::Serial)?.as_bytes()));
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// Writes both files or none. Whoever finds one finds all of it.
fn write(
    folder: &Path,
    name: &str,
    certificate: &Certificate,
    key: &KeyPair,
    force: bool,
) -> Result<(PathBuf, PathBuf), Error> {
    let [certificate_path, key_path] =
        ["pem", "key"].map(|extension| folder.join(format!("{name}.{extension}")));
    let failed = |path: &Path, source| Error::Write { path: path.to_owned(), source };
    let key_draft =
        draft(folder, &key.serialize_pem(), KEY_MODE).map_err(|source| failed(&key_path, source))?;
    let draft = draft(folder, &certificate.pem(), CERTIFICATE_MODE);
    let draft = draft.map_err(|source| failed(&certificate_path, source))?;
    publish(key_draft, &key_path, force)?;
    publish(draft, &certificate_path, force).inspect_err(|_| {
        // Nothing was replaced then: the key is new, and of no use without its certificate.
        if !force && let Err(error) = fs::remove_file(&key_path) {
            tracing::warn!(%error, key = %key_path.display(), "a key without a certificate is left");
        }
    })?;
    Ok((certificate_path, key_path))
}

/// Writes a file that has no name to be found by yet.
fn draft(folder: &Path, content: &str, mode: u32) -> io::Result<NamedTempFile> {
    let mut file = tempfile::Builder::new().permissions(Permissions::from_mode(mode)).tempfile_in(folder)?;
    file.write_all(content.as_bytes())?;
    file.as_file().sync_all()?;
    Ok(file)
}

fn publish(draft: NamedTempFile, path: &Path, force: bool) -> Result<(), Error> {
    let published = if force { draft.persist(path) } else { draft.persist_noclobber(path) };
    match published.map_err(|failed| failed.error) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(Error::Exists { path: path.to_owned() })
        }
        Err(source) => Err(Error::Write { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, ffi::OsString};

    use webpki::EndEntityCert;

    use super::*;
    use crate::principal::Role;

    fn principal(name: &str) -> Principal {
        Principal::new(name, Role::Platform).unwrap()
    }

    fn names(folder: &Path) -> BTreeSet<OsString> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn what_is_issued_can_be_used() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("north/certificates");
        let ca = init(&folder, false).unwrap();
        for principal in [principal("alpha"), Principal::new("alice", Role::Operator).unwrap()] {
            let written = issue(&folder, &principal, 1, false).unwrap();
            let credentials = Credentials::load(&ca.certificate, &written.certificate, &written.key).unwrap();
            assert_eq!(*credentials.principal(), principal);
            assert_eq!(written.until, (OffsetDateTime::now_utc() + Duration::DAY).date());
        }
        let files = ["alice.key", "alice.pem", "alpha.key", "alpha.pem", "ca.key", "ca.pem"];
        assert_eq!(names(&folder), BTreeSet::from(files.map(OsString::from)));
        for file in files {
            let mode = fs::metadata(folder.join(file)).unwrap().permissions().mode() & 0o777;
            let most = if file.ends_with("key") { 0o600 } else { 0o644 };
            assert_eq!(mode & !most, 0, "{file}: {mode:o}");
        }
    }

    #[test]
    fn what_is_there_stays_unless_forced() {
        let folder = tempfile::tempdir().unwrap();
        let content =
            |written: &Written| [&written.certificate, &written.key].map(|path| fs::read(path).unwrap());
        let exists = |result: Result<Written, Error>| matches!(result, Err(Error::Exists { .. }));
        let ca = init(folder.path(), false).unwrap();
        let alpha = issue(folder.path(), &principal("alpha"), 1, false).unwrap();
        let before = (content(&ca), content(&alpha));
        assert!(exists(init(folder.path(), false)));
        assert!(exists(issue(folder.path(), &principal("alpha"), 1, false)));
        assert_eq!(before, (content(&ca), content(&alpha)));

        issue(folder.path(), &principal("alpha"), 1, true).unwrap();
        init(folder.path(), true).unwrap();
        let after = (content(&ca), content(&alpha));
        assert!(before.0[0] != after.0[0] && before.0[1] != after.0[1]);
        assert!(before.1[0] != after.1[0] && before.1[1] != after.1[1]);
        assert_eq!(names(folder.path()).len(), 4);
    }

    #[test]
    fn a_key_is_not_written_beside_another_certificate() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("ca.pem"), "another one").unwrap();
        assert!(matches!(init(folder.path(), false), Err(Error::Exists { .. })));
        assert_eq!(names(folder.path()), BTreeSet::from([OsString::from("ca.pem")]));
    }

    #[test]
    fn the_files_of_two_cas_issue_nothing() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        init(one.path(), false).unwrap();
        init(other.path(), false).unwrap();
        fs::copy(other.path().join("ca.pem"), one.path().join("ca.pem")).unwrap();
        let issued = issue(one.path(), &principal("alpha"), 1, false);
        assert!(matches!(issued, Err(Error::Mismatch { .. })), "{issued:?}");
        assert_eq!(names(one.path()).len(), 2);
    }

    #[test]
    fn a_key_that_others_can_read_issues_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let ca = init(folder.path(), false).unwrap();
        fs::set_permissions(&ca.key, Permissions::from_mode(0o640)).unwrap();
        let issued = issue(folder.path(), &principal("alpha"), 1, false);
        assert!(matches!(issued, Err(Error::Ca(tls::Error::Exposed { .. }))), "{issued:?}");
    }

    #[test]
    fn no_name_takes_the_cas_files() {
        let folder = tempfile::tempdir().unwrap();
        init(folder.path(), false).unwrap();
        assert!(matches!(issue(folder.path(), &principal(CA), 1, true), Err(Error::Reserved)));
    }

    #[test]
    fn no_two_certificates_have_one_number_and_no_two_cas_one_name() {
        let authorities = [Authority::generate().unwrap(), Authority::generate().unwrap()];
        assert_ne!(authorities[0].name(), authorities[1].name());
        let validity = from_now(1);
        let numbers: BTreeSet<Vec<u8>> = (0..8)
            .map(|_| authorities[0].issue(&principal("alpha"), &validity).unwrap())
            .map(|pair| EndEntityCert::try_from(pair.certificate.der()).unwrap().serial().to_vec())
            .collect();
        assert_eq!(numbers.len(), 8);
        assert!(numbers.iter().all(|number| number.len() >= 8), "{numbers:?}");
    }
}
