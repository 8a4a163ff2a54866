//! A way between two platforms on which things go wrong.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use capsule::header::{HEADER_BYTES, Header};
use fastrand::Rng;

/// Bytes that are passed on at once.
const PIECE_BYTES: usize = 16 << 10;

/// How often a connection that stands still is looked at again.
const LOOK: Duration = Duration::from_millis(5);

/// What makes no sense may begin like this.
const BEGINNINGS: [&str; 5] =
    ["", "\x16\x03\x01", "HTTP/1.1 ", "HTTP/1.1 200 maybe\r\n\r\n{{{", "{\"stage\":"];

/// Longest rest of it in bytes.
const MAX_GARBAGE_BYTES: usize = 200;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// All connections break once so many bytes have passed, in both directions together; then nothing goes
    /// wrong any more.
    CutAfter(u64),
    /// The byte that comes after so many is another one.
    FlipAfter(u64),
    /// Nothing passes any more once so many bytes have, and nobody is told.
    StallAfter(u64),
    /// Each piece comes later by this.
    Delay(Duration),
    /// All connections break, and whoever connects is answered with something that makes no sense: what,
    /// begins with this seed.
    Garbage(u64),
    /// All connections break, and whoever connects gets to another address.
    Elsewhere(SocketAddr),
    /// Capsules say that their format has this version.
    Version(u32),
}

/// A TCP proxy in front of one address. Dropping it breaks all connections, and takes no new ones.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    fault: Mutex<Fault>,
    /// Bytes that have passed since the fault was set.
    passed: AtomicU64,
    open: Mutex<Vec<TcpStream>>,
}

impl Proxy {
    /// One in front of `target`.
    ///
    /// # Errors
    /// Where there is no port left, or no thread.
    pub fn start(target: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let address = listener.local_addr()?;
        let (fault, passed, open) = (Mutex::new(Fault::None), AtomicU64::new(0), Mutex::default());
        let shared = Arc::new(Shared { fault, passed, open });
        let weak = Arc::downgrade(&shared);
        thread::Builder::new().name("proxy".into()).spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Some(shared) = weak.upgrade() else { return };
                // One that can't be served is closed.
                drop(shared.serve(client, target));
            }
        })?;
        Ok(Self { address, shared })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Says what is to go wrong from now on.
    pub fn set(&self, fault: Fault) {
        let mut current = self.shared.fault();
        self.shared.passed.store(0, Ordering::SeqCst);
        *current = fault;
        if matches!(fault, Fault::Garbage(_) | Fault::Elsewhere(_)) {
            self.shared.cut();
        }
    }

    /// How many bytes have passed since then.
    pub fn passed(&self) -> u64 {
        self.shared.passed.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.cut();
        // The listener goes once somebody has come: nobody else will.
        drop(TcpStream::connect(self.address));
    }
}

impl Shared {
    fn fault(&self) -> std::sync::MutexGuard<'_, Fault> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cut(&self) {
        for stream in self.open.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // Some are closed already.
            drop(stream.shutdown(Shutdown::Both));
        }
    }

    fn serve(self: &Arc<Self>, mut client: TcpStream, target: SocketAddr) -> io::Result<()> {
        let fault = *self.fault();
        let target = match fault {
            Fault::Garbage(seed) => return self.answer(&mut client, seed),
            Fault::Elsewhere(other) => other,
            _ => target,
        };
        let server = TcpStream::connect(target)?;
        for stream in [&client, &server] {
            stream.set_nodelay(true)?;
            self.open.lock().unwrap_or_else(PoisonError::into_inner).push(stream.try_clone()?);
        }
        for (from, to) in [(client.try_clone()?, server.try_clone()?), (server, client)] {
            let shared = Arc::clone(self);
            thread::Builder::new().name("proxy".into()).spawn(move || {
                // A broken connection ends it.
                drop(shared.pass(&from, &to));
                drop((from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both)));
            })?;
        }
        Ok(())
    }

    /// Answers with garbage, which is another one each time.
    fn answer(&self, client: &mut TcpStream, seed: u64) -> io::Result<()> {
        let mut chance = Rng::with_seed(seed.wrapping_add(self.passed.load(Ordering::SeqCst)));
        let mut garbage = BEGINNINGS[chance.usize(0..BEGINNINGS.len())].as_bytes().to_vec();
        garbage.extend((0..chance.usize(1..=MAX_GARBAGE_BYTES)).map(|_| chance.u8(..)));
        self.passed.fetch_add(garbage.len() as u64, Ordering::SeqCst);
        client.write_all(&garbage)
    }

    fn pass(&self, mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
        let mut piece = [0; PIECE_BYTES];
        loop {
            let length = from.read(&mut piece)?;
            if length == 0 {
                return to.shutdown(Shutdown::Write);
            }
            let before = self.passed.fetch_add(length as u64, Ordering::SeqCst);
            let after = before + length as u64;
            let fault = *self.fault();
            match fault {
                Fault::None | Fault::Garbage(_) | Fault::Elsewhere(_) => {}
                Fault::Delay(delay) => thread::sleep(delay),
                Fault::CutAfter(bytes) if after > bytes => {
                    *self.fault() = Fault::None;
                    self.cut();
                    return Ok(());
                }
                Fault::FlipAfter(bytes) if (before..after).contains(&bytes) => {
                    piece[usize::try_from(bytes - before).unwrap_or(0)] ^= 0x20;
                }
                Fault::StallAfter(bytes) if after > bytes => {
                    while *self.fault() == fault {
                        thread::sleep(LOOK);
                    }
                }
                Fault::Version(version) => change_version(&mut piece[..length], version),
                Fault::CutAfter(_) | Fault::FlipAfter(_) | Fault::StallAfter(_) => {}
            }
            to.write_all(&piece[..length])?;
        }
    }
}

/// Changes the version of a capsule whose header is as a whole in a piece of what passes.
fn change_version(piece: &mut [u8], version: u32) {
    let capsule = piece.array_windows().position(|bytes| Header::from_bytes(bytes).is_ok());
    let Some(header) = capsule.map(|at| &mut piece[at..at + HEADER_BYTES]) else { return };
    let header: &mut [u8; HEADER_BYTES] = header.try_into().expect("a header");
    *header = Header { version, ..Header::from_bytes(header).expect("a header") }.to_bytes();
}
