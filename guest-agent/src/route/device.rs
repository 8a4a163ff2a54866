//! By the kernel module's device: the module takes callers one after another, asks the VMM, and makes a child
//! whole before the ioctl returns in it. [`Device::fork`] has the order.

use std::io;

use nix::errno::Errno;
use vmfork_abi::device::{ForkArguments, StatusArguments};
use vmfork_abi::{ErrorCode, Identity, ListedCopy, MAX_CHILDREN, Role, Status};

use crate::fork::which;
use crate::raw::{CopyBytes, DeviceFile};
use crate::route::RawReport;
use crate::{Fork, ForkError, ForkRequest, IdentityError, OpenError, OutcomeError, StatusError, identity};

/// The device, whose module speaks this version of its interface.
#[derive(Debug)]
pub(crate) struct Device {
    file: DeviceFile,
}

impl Device {
    /// Opens the device, and asks whether its module understands this program.
    ///
    /// # Errors
    ///
    /// [`OpenError::NoDevice`], [`OpenError::DeviceForbidden`], [`OpenError::OpenDevice`],
    /// [`OpenError::DeviceVersion`] or [`OpenError::AskDevice`].
    pub(crate) fn open() -> Result<Self, OpenError> {
        let device = Self { file: DeviceFile::open().map_err(OpenError::of_device)? };
        device.file.identity().map_err(unanswered)?;
        Ok(device)
    }

    /// Who this VM is, and how it came out of its latest fork, unchecked.
    ///
    /// # Errors
    ///
    /// [`StatusError::Ask`] where the module does not tell.
    pub(crate) fn report(&self) -> Result<RawReport, StatusError> {
        status(|copies| self.file.status(copies)).map_err(|errno| StatusError::Ask { source: errno.into() })
    }

    /// Whether the module answers, and this caller may ask it for a fork: it has all else that one needs.
    ///
    /// # Errors
    ///
    /// [`ForkError::Open`] where it does not, or the caller may not.
    pub(crate) fn check(&self) -> Result<(), ForkError> {
        self.check_permission()?;
        self.file.identity().map(drop).map_err(|errno| ForkError::Open(unanswered(errno)))
    }

    fn check_permission(&self) -> Result<(), ForkError> {
        let forbidden = || OpenError::DeviceForbidden { source: Errno::EACCES.into() };
        if self.file.may_fork() { Ok(()) } else { Err(ForkError::Open(forbidden())) }
    }

    /// Forks this VM once it is this caller's turn, and returns in the parent and in every child.
    ///
    /// # Errors
    ///
    /// [`ForkError`], in the caller's VM or in a copy.
    pub(crate) fn fork(&self, request: &ForkRequest) -> Result<Fork, ForkError> {
        self.check_permission()?;
        let now = identity::monotonic().map_err(|source| ForkError::ReadClock { source })?;
        let mut arguments = request.at(now);
        let mut copies = vec![[0; ListedCopy::BYTES]; request.count() as usize];
        let asked = self.file.fork(&mut arguments, &mut copies);
        // From here on there may be several VMs, and this is any one of them.
        let fork = outcome(asked, &arguments, &copies)?;
        if fork.role == Role::Child {
            set_hostname(&fork)?;
        }
        Ok(fork)
    }
}

/// Why the device does not serve this program.
fn unanswered(errno: Errno) -> OpenError {
    let source = io::Error::from(errno);
    match errno {
        // The size of an argument is a part of the request's number.
        Errno::EPROTONOSUPPORT | Errno::ENOTTY => OpenError::DeviceVersion { source },
        _ => OpenError::AskDevice { source },
    }
}

/// What the module says of this VM, asked as often as it takes to have room for all copies.
fn status(ask: impl Fn(&mut [CopyBytes]) -> nix::Result<StatusArguments>) -> nix::Result<RawReport> {
    let mut copies = Vec::new();
    loop {
        let status = ask(&mut copies)?;
        let listed = status.listed.min(MAX_CHILDREN) as usize;
        if listed <= copies.len() {
            return Ok(report(&status.identity, status.listed, &copies));
        }
        copies.resize(listed, [0; ListedCopy::BYTES]);
    }
}

/// What has come out of a fork that was `asked` for, by the module's answer: vmfork_abi::device has the
/// table.
fn outcome(asked: nix::Result<()>, answer: &ForkArguments, copies: &[CopyBytes]) -> Result<Fork, ForkError> {
    let report = report(&answer.identity, answer.listed, copies);
    let Err(errno) = asked else { return which(&report) };
    Err(match errno {
        Errno::ECONNREFUSED => refusal(answer.error),
        Errno::ESTALE => ForkError::Copied,
        Errno::EINTR => ForkError::Interrupted,
        Errno::ETIMEDOUT => ForkError::DeadlinePassed,
        Errno::ENOLINK => ForkError::Silent,
        Errno::EPROTO => match (report.side(), which(&report)) {
            (None, _) => ForkError::Senseless,
            (Some(_), Err(impossible)) => impossible,
            (role, Ok(_)) => ForkError::Outcome { role, source: OutcomeError::NotAccepted },
        },
        Errno::EUCLEAN => {
            let role = which(&report)?.role;
            ForkError::Identity { role, source: IdentityError::KernelClock }
        }
        Errno::EPROTONOSUPPORT | Errno::ENOTTY => ForkError::Open(unanswered(errno)),
        _ => ForkError::Device { role: report.side(), source: errno.into() },
    })
}

fn refusal(error: u32) -> ForkError {
    match ErrorCode::from_number(error) {
        Some(code) if code != ErrorCode::None => ForkError::Refused(code),
        _ => ForkError::UnknownAnswer { status: Status::Failed.number(), error },
    }
}

/// What the module says of this VM, of whose copies it `listed` so many. A list that is no parent's is of an
/// older fork.
fn report(identity: &[u8; Identity::BYTES], listed: u32, copies: &[CopyBytes]) -> RawReport {
    let report = RawReport { identity: Identity::from_bytes(identity), ..RawReport::default() };
    if report.side() != Some(Role::Parent) {
        return report;
    }
    let copies = copies.iter().take(listed as usize).map(ListedCopy::from_bytes).collect();
    RawReport { listed, copies, ..report }
}

/// Gives a child its host name, which the module leaves as it was. A caller that may not does without.
fn set_hostname(fork: &Fork) -> Result<(), ForkError> {
    match identity::set_hostname(&fork.name) {
        Err(IdentityError::SetHostname { source, .. })
            if source.kind() == io::ErrorKind::PermissionDenied =>
        {
            Ok(())
        }
        set => set.map_err(|source| ForkError::Identity { role: fork.role, source }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::outcome::tests::{child, copies as listed_copies, parent};

    /// What comes out where the module answers a fork so, in a VM that has this identity.
    fn answered(errno: Errno, identity: Identity) -> ForkError {
        let answer = ForkArguments { identity: identity.to_bytes(), ..ForkArguments::default() };
        outcome(Err(errno), &answer, &[]).unwrap_err()
    }

    fn copies() -> Vec<CopyBytes> {
        listed_copies().iter().map(ListedCopy::to_bytes).collect()
    }

    #[test]
    fn a_parent_is_told_of_its_copies_and_a_child_of_none() {
        let answer = ForkArguments { identity: parent().to_bytes(), listed: 3, ..ForkArguments::default() };
        let fork = outcome(Ok(()), &answer, &copies()).unwrap();
        assert_eq!((fork.role, fork.copies.len(), fork.copies[1].platform.as_str()), (Role::Parent, 3, "b"));
        let answer = ForkArguments { listed: 0, ..answer };
        assert_eq!(outcome(Ok(()), &answer, &copies()).unwrap().copies, []);
        let answer = ForkArguments { identity: child().to_bytes(), listed: 3, ..answer };
        let fork = outcome(Ok(()), &answer, &copies()).unwrap();
        assert_eq!((fork.role, fork.copies.len()), (Role::Child, 0));
    }

    /// A module that has these copies to list, and says that it has `listed`.
    fn module(listed: u32) -> impl Fn(&mut [CopyBytes]) -> nix::Result<StatusArguments> {
        move |room| {
            room.iter_mut().zip(copies()).for_each(|(room, copy)| *room = copy);
            Ok(StatusArguments { identity: parent().to_bytes(), listed, ..StatusArguments::default() })
        }
    }

    #[test]
    fn a_status_has_all_copies_that_there_can_be() {
        let fork = Fork::from_report(&status(module(3)).unwrap()).unwrap();
        assert_eq!((fork.role, fork.copies.len()), (Role::Parent, 3));
        assert_eq!(Fork::from_report(&status(module(0)).unwrap()).unwrap().copies, []);
        for listed in [MAX_CHILDREN, MAX_CHILDREN + 1, u32::MAX] {
            let report = status(module(listed)).unwrap();
            assert_eq!((report.listed, report.copies.len()), (listed, MAX_CHILDREN as usize));
            assert_eq!(Fork::from_report(&report).unwrap_err(), OutcomeError::Listed { listed, count: 3 });
        }
        assert_eq!(status(|_| Err(Errno::EIO)).unwrap_err(), Errno::EIO);
    }

    #[test]
    fn an_impossible_identity_is_no_outcome() {
        let nobody = Identity { vm_id: [0; 16], ..child() };
        let answer = ForkArguments { identity: nobody.to_bytes(), ..ForkArguments::default() };
        let error = outcome(Ok(()), &answer, &[]).unwrap_err();
        assert!(
            matches!(error, ForkError::Outcome { role: Some(Role::Child), source: OutcomeError::NoId }),
            "{error}"
        );
        let booted = outcome(Ok(()), &ForkArguments::default(), &[]).unwrap_err();
        assert!(matches!(booted, ForkError::Outcome { role: None, .. }), "{booted}");
    }

    #[test]
    fn whoever_waited_in_vain_is_told_why() {
        let nothing = Identity::default();
        assert!(matches!(answered(Errno::ESTALE, nothing), ForkError::Copied));
        assert!(matches!(answered(Errno::EINTR, nothing), ForkError::Interrupted));
        assert!(matches!(answered(Errno::ETIMEDOUT, nothing), ForkError::DeadlinePassed));
        assert!(matches!(answered(Errno::ENOLINK, nothing), ForkError::Silent));
        for version in [Errno::EPROTONOSUPPORT, Errno::ENOTTY] {
            let error = answered(version, nothing);
            assert!(matches!(error, ForkError::Open(OpenError::DeviceVersion { .. })), "{error}");
        }
    }

    #[test]
    fn refusals_keep_their_code() {
        let refused = |error| {
            let answer = ForkArguments { error, ..ForkArguments::default() };
            outcome(Err(Errno::ECONNREFUSED), &answer, &[]).unwrap_err()
        };
        for &code in ErrorCode::ALL.iter().filter(|&&code| code != ErrorCode::None) {
            assert_eq!(refused(code.number()).code(), Some(code));
        }
        for unknown in [0, 999, u32::MAX] {
            let error = refused(unknown);
            assert!(
                matches!(error, ForkError::UnknownAnswer { status: 2, error } if error == unknown),
                "{error}"
            );
        }
    }

    #[test]
    fn an_answer_without_sense_tells_whether_there_was_a_fork() {
        assert!(matches!(answered(Errno::EPROTO, Identity::default()), ForkError::Senseless));
        let nameless = answered(Errno::EPROTO, Identity { name: [0; 64], ..child() });
        assert!(
            matches!(nameless, ForkError::Outcome { role: Some(Role::Child), source: OutcomeError::Name }),
            "{nameless}"
        );
        let error = answered(Errno::EPROTO, parent());
        assert!(
            matches!(
                error,
                ForkError::Outcome { role: Some(Role::Parent), source: OutcomeError::NotAccepted }
            ),
            "{error}"
        );
    }

    #[test]
    fn a_child_without_its_own_time_is_incomplete() {
        let error = answered(Errno::EUCLEAN, child());
        assert_eq!(
            (error.role(), error.to_string()),
            (Some(Role::Child), "this child is incomplete".to_owned())
        );
    }

    #[test]
    fn other_errors_are_the_modules_own() {
        for errno in [Errno::EINVAL, Errno::EFAULT, Errno::EIO] {
            let error = answered(errno, Identity::default());
            assert!(matches!(error, ForkError::Device { role: None, .. }), "{error}");
            assert_eq!(
                answered(errno, child()).role(),
                Some(Role::Child),
                "a child is never taken for no fork"
            );
        }
    }

    #[test]
    fn errors_at_the_start_tell_versions_apart() {
        assert!(matches!(unanswered(Errno::EPROTONOSUPPORT), OpenError::DeviceVersion { .. }));
        assert!(matches!(unanswered(Errno::ENOTTY), OpenError::DeviceVersion { .. }));
        assert!(matches!(unanswered(Errno::EIO), OpenError::AskDevice { .. }));
    }

    proptest! {
        #[test]
        fn whatever_the_kernel_answers_is_an_outcome_or_an_error(
            errno in 0..140,
            bytes in prop::collection::vec(any::<u8>(), ForkArguments::BYTES),
            role in 0..4u32,
            listed in prop_oneof![0..5u32, any::<u32>()],
            room in 0..4usize,
        ) {
            let mut answer = ForkArguments::from_bytes(&bytes.try_into().unwrap());
            answer.listed = listed;
            answer.identity[..4].copy_from_slice(&role.to_le_bytes());
            let asked = if errno == 0 { Ok(()) } else { Err(Errno::from_raw(errno)) };
            match outcome(asked, &answer, &copies()[..room]) {
                Ok(fork) => prop_assert!(errno == 0 && fork.role != Role::Booted),
                Err(error) => prop_assert!(error.role() != Some(Role::Booted)),
            }
        }

        #[test]
        fn of_a_possible_vm_any_list_is_an_outcome_or_an_error(
            count in 0..6u32,
            listed in prop_oneof![0..6u32, any::<u32>()],
            bytes in prop::collection::vec(any::<[u8; ListedCopy::BYTES]>(), 0..4),
            flipped in prop::option::of((0..3usize, 0..ListedCopy::BYTES)),
        ) {
            let identity = Identity { count, ..parent() };
            let answer = ForkArguments { identity: identity.to_bytes(), listed, ..ForkArguments::default() };
            let mut copies = copies();
            if let Some((copy, byte)) = flipped {
                copies[copy][byte] ^= 0x40;
            }
            for copies in [copies, bytes] {
                if let Ok(fork) = outcome(Ok(()), &answer, &copies) {
                    prop_assert!(fork.copies.is_empty() || fork.copies.len() == count as usize);
                }
            }
        }
    }
}
