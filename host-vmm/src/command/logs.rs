//! `host-vmm stop` and `host-vmm logs`: single VMs of a platform.

use std::{
    io::{self, Write, stdout},
    process::ExitCode,
    thread,
    time::Duration,
};

use api::client::{self, Log, Piece};

use super::asked::endpoint;
use crate::cli;

/// How long a platform is to wait for more, before it says that there is nothing.
const WAIT: Duration = Duration::from_secs(30);

/// After what time a VM is looked at again that does not run yet.
const LOOK: Duration = Duration::from_millis(200);

/// Stops VMs, one after another.
///
/// # Errors
/// Where no platform answers, or it has no such VM.
pub(crate) fn stop(options: &cli::Stop) -> anyhow::Result<ExitCode> {
    let platform = endpoint(&options.platform)?;
    options.vms.iter().try_for_each(|vm| client::stop(platform.as_ref(), vm))?;
    Ok(ExitCode::SUCCESS)
}

/// Prints what a VM has written, and goes on with what it writes where that is wanted.
///
/// # Errors
/// Where no platform answers, or it has no such VM.
pub(crate) fn logs(options: &cli::Logs) -> anyhow::Result<ExitCode> {
    let mut log = Log::open(endpoint(&options.platform)?.as_ref(), &options.vm)?;
    let wait = if options.follow { WAIT } else { Duration::ZERO };
    loop {
        let Piece { bytes, is_last } = log.read(wait)?;
        let mut out = stdout().lock();
        match out.write_all(&bytes).and_then(|()| out.flush()) {
            // Whoever reads it has had enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
            written => written?,
        }
        match (is_last, bytes.is_empty(), options.follow) {
            (true, ..) | (false, true, false) => return Ok(ExitCode::SUCCESS),
            (false, true, true) => thread::sleep(LOOK),
            (false, false, _) => {}
        }
    }
}
