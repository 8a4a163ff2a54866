//! What one side shows, and whom it believes.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::Arc,
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
    version::TLS13,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{Error, Fault, HTTP};
use crate::principal::Principal;

/// Longest file in bytes: some certificates, or a key.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// Bits of a file's mode that let others than its owner at it.
const OTHERS: u32 = 0o077;

/// A certificate with its key, and the CA whose certificates are believed.
///
/// Sessions are not resumed: a handshake is cheap for those who talk over few connections, and a resumed
/// session would go on without another look at the certificate, after that has expired too.
#[derive(Clone)]
pub struct Credentials {
    principal: Principal,
    chain: Vec<CertificateDer<'static>>,
    verifier: Arc<dyn ClientCertVerifier>,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl Credentials {
    /// Reads the CA's certificate, the own one and its key, all in PEM. A CA's file with several certificates
    /// means several CAs, each as good as the others: so a cluster gets from one CA to the next.
    ///
    /// # Errors
    /// Where a file can't be read, or others can read the key; where the three don't belong together, or the
    /// certificate is not valid at present.
    pub fn load(ca: &Path, certificate: &Path, key: &Path) -> Result<Self, Error> {
        let (trusted, chain) = (read_certificates(ca)?, read_certificates(certificate)?);
        Self::new(&trusted, chain, &read_key(key)?)?.checked()
    }

    /// Puts them together. Whether they are of use is for [`checked`](Self::checked) to say.
    pub(crate) fn new(
        trusted: &[CertificateDer<'static>],
        chain: Vec<CertificateDer<'static>>,
        key: &PrivateKeyDer<'static>,
    ) -> Result<Self, Error> {
        let principal = chain.first().and_then(Principal::of).ok_or(Error::Nobody)?;
        let mut roots = RootCertStore::empty();
        trusted.iter().try_for_each(|certificate| roots.add(certificate.clone())).map_err(Error::Ca)?;
        let (roots, provider) = (Arc::new(roots), Arc::new(ring::default_provider()));
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
        let verifier = verifier.build().map_err(Error::Verifier)?;

        let server = ServerConfig::builder_with_provider(Arc::clone(&provider));
        let server = server.with_protocol_versions(&[&TLS13]).map_err(Error::Setup)?;
        let server = server.with_client_cert_verifier(Arc::clone(&verifier));
        let mut server = server.with_single_cert(chain.clone(), key.clone_key()).map_err(Error::Pair)?;
        server.alpn_protocols = vec![HTTP.to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;

        let client = ClientConfig::builder_with_provider(provider);
        let client = client.with_protocol_versions(&[&TLS13]).map_err(Error::Setup)?;
        let client = client.with_root_certificates(roots);
        let mut client = client.with_client_auth_cert(chain.clone(), key.clone_key()).map_err(Error::Pair)?;
        client.alpn_protocols = vec![HTTP.to_vec()];
        client.resumption = Resumption::disabled();
        // Who is wanted is nobody else's business: it would be sent in the clear, and a platform has one
        // certificate.
        client.enable_sni = false;

        Ok(Self { principal, chain, verifier, server: Arc::new(server), client: Arc::new(client) })
    }

    /// Those that others of the same CA would take at present.
    pub(crate) fn checked(self) -> Result<Self, Error> {
        let [certificate, rest @ ..] = self.chain.as_slice() else { return Err(Error::Nobody) };
        match self.verifier.verify_client_cert(certificate, rest, UnixTime::now()) {
            Ok(_) => Ok(self),
            Err(error) => Err(Error::Useless { principal: self.principal, source: Fault::from(&error) }),
        }
    }

    /// Whose they are.
    pub fn principal(&self) -> &Principal {
        &self.principal
    }

    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.server))
    }

    pub(super) fn connector(&self) -> TlsConnector {
        TlsConnector::from(Arc::clone(&self.client))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("principal", &self.principal).finish_non_exhaustive()
    }
}

/// Reads certificates.
pub(crate) fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let pem = File::open(path)
        .and_then(|file| read(&file))
        .map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let certificates: Option<Vec<_>> = CertificateDer::pem_slice_iter(&pem).map(Result::ok).collect();
    let certificates = certificates.filter(|certificates| !certificates.is_empty());
    certificates.ok_or_else(|| Error::Pem { path: path.to_owned(), what: "certificate" })
}

/// Reads a key that its owner alone can read.
pub(crate) fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, Error> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.permissions().mode() & OTHERS != 0 {
        return Err(Error::Exposed { path: path.to_owned() });
    }
    let pem = read(&file).map_err(failed)?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|_| Error::Pem { path: path.to_owned(), what: "private key" })
}

/// Reads a file of a length that makes sense.
fn read(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    let fits = u64::try_from(bytes.len()).is_ok_and(|length| length <= MAX_FILE_BYTES);
    if fits { Ok(bytes) } else { Err(io::ErrorKind::FileTooLarge.into()) }
}
