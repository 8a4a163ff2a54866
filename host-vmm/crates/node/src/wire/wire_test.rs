//! What one side can build, the other accepts.

use std::{collections::BTreeSet, os::fd::AsFd, time::Duration};

use base::text::Reason;
use proptest::prelude::*;
use serde::{Serialize, de::DeserializeOwned};
use types::{ExitReason, ForkStep, Locality, Requester, StepTiming, VmIdentity, VmShape};
use uuid::Uuid;
use vmfork_abi::ErrorCode;
use vmm::memory::{self, MAX_LAYERS, Run, WorkingSet};

use super::*;

/// The content of messages: text from outside, numbers, and the pages that a guest has written to.
#[derive(Debug, Clone)]
struct Matter {
    text: String,
    number: u64,
    runs: Vec<Run>,
}

impl Matter {
    fn any() -> impl Strategy<Value = Self> {
        let run = (any::<u64>(), any::<u64>()).prop_map(|(page, pages)| Run { page, pages, file_page: 0 });
        // Most texts are far too long.
        let text = ("\\p{Any}{0,20}", 0..20_000_usize).prop_map(|(piece, times)| piece.repeat(times));
        (text, any::<u64>(), proptest::collection::vec(run, 0..4000)).prop_map(|(text, number, runs)| Self {
            text,
            number,
            runs,
        })
    }

    fn reason(&self) -> Reason {
        Reason::from(self.text.as_str())
    }

    fn small(&self) -> u32 {
        u32::try_from(self.number % u64::from(u32::MAX)).unwrap()
    }

    fn working_set(&self) -> WorkingSet {
        WorkingSet::new(&self.runs)
    }

    /// Names are made by the platform, from types that it has checked.
    fn identity(&self) -> VmIdentity {
        VmIdentity {
            id: Uuid::from_u128(self.number.into()),
            parent: Uuid::nil(),
            name: format!("{}.{}", "x".repeat(32), u64::MAX),
            vm_type: "x".repeat(32),
            index: self.small(),
            count: self.small(),
            generation: self.small(),
        }
    }

    fn steps(&self) -> Vec<StepTiming> {
        ForkStep::ALL.iter().map(|step| (*step, self.number, u64::MAX)).collect()
    }

    fn code(&self) -> u32 {
        let codes = [ErrorCode::None, ErrorCode::Internal, ErrorCode::Place, ErrorCode::Launch];
        codes[usize::try_from(self.number % 4).unwrap()].number()
    }

    fn to_node(&self) -> Vec<ToNode> {
        let copy = |working_set| CopyOrder {
            identity: self.identity(),
            seq: self.number,
            arrivals: self.small(),
            lazy: true,
            working_set,
            first_vcpu_late: self.number.is_multiple_of(2),
        };
        vec![
            ToNode::Boot {
                identity: self.identity(),
                cmdline: "quiet".into(),
                prealloc: true,
                faults: ForkStep::ALL.into(),
            },
            ToNode::StandBy { working_set: Some(self.working_set()) },
            ToNode::StandBy { working_set: None },
            ToNode::Copy(copy(Prefetch::Fill(self.working_set()))),
            ToNode::Copy(copy(Prefetch::Record)),
            ToNode::Copy(copy(Prefetch::None)),
            ToNode::Input(self.text.bytes().take(1024).collect()),
            ToNode::Whole,
            ToNode::Fork { count: self.small() },
            ToNode::Aborted { code: self.code(), why: self.reason() },
        ]
    }

    fn to_platform(&self) -> Vec<ToPlatform> {
        let by_guest = ForkOrder::Guest {
            seq: self.number,
            count: 1024,
            vm_type: "x".repeat(32),
            location: Locality::Any,
        };
        let fork = |order, fault| ToPlatform::Fork { order, announced: true, fault };
        let report = |asked_by, why| Report {
            asked_by,
            seq: self.number,
            count: self.small(),
            code: self.code(),
            why,
            rung_ns: self.number,
            pause_ns: u64::MAX,
            untold: self.number,
            steps: self.steps(),
        };
        vec![
            ToPlatform::Ready,
            ToPlatform::Failed(self.reason()),
            ToPlatform::Faults { start: self.number },
            ToPlatform::Running { generation_id: true },
            ToPlatform::Launched { seq: self.number, steps: self.steps() },
            ToPlatform::Touched(self.working_set()),
            ToPlatform::Announce,
            fork(by_guest, None),
            fork(ForkOrder::Operator { count: self.small() }, Some(ForkStep::Place)),
            ToPlatform::Abort,
            ToPlatform::Answer { code: self.code(), why: self.reason() },
            ToPlatform::Report(report(Requester::Guest, Some(self.reason()))),
            ToPlatform::Report(report(Requester::Operator, None)),
            ToPlatform::Ended(ExitReason::Broken(self.reason())),
            ToPlatform::Ended(ExitReason::SourceLost(self.reason())),
            ToPlatform::Ended(ExitReason::PoweredOff),
        ]
    }

    fn spawned(&self) -> Vec<Spawned> {
        vec![Spawned::Process(self.small()), Spawned::Failed(self.reason())]
    }
}

/// Number of a kind of message. Whoever adds one learns here that it is to be built above.
fn kind_to_node(message: &ToNode) -> usize {
    match message {
        ToNode::Boot { .. } => 0,
        ToNode::StandBy { .. } => 1,
        ToNode::Copy(_) => 2,
        ToNode::Input(_) => 3,
        ToNode::Whole => 4,
        ToNode::Fork { .. } => 5,
        ToNode::Aborted { .. } => 6,
    }
}

/// What comes out at the other end, which has taken it.
fn sent<M: Serialize + DeserializeOwned>(message: &M) -> M {
    let (ours, theirs) = Link::<M, u8>::pair().unwrap();
    ours.send(message, &[]).unwrap();
    Link::<u8, M>::new(theirs).receive().unwrap().0
}

/// Whether it is the same message: the bytes are.
fn is_same<M: Serialize + DeserializeOwned>(message: &M) -> bool {
    use capsule::codec::encode;
    encode(&sent(message)).unwrap() == encode(message).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_one_side_builds_the_other_accepts(matter in Matter::any()) {
        for message in matter.to_node() {
            prop_assert!(is_same(&message), "{:?}", message);
        }
        for message in matter.to_platform() {
            prop_assert!(is_same(&message) && sent(&message).is_valid(), "{:?}", message);
        }
        for message in matter.spawned() {
            prop_assert!(is_same(&message), "{:?}", message);
        }
        let spawn = Spawn { config: VmShape { ram_bytes: matter.number, vcpus: 255 }, is_cold: true, max_pause: Duration::from_nanos(matter.number) };
        prop_assert!(is_same(&spawn));
    }

    #[test]
    fn text_of_a_node_that_cuts_nothing_is_cut_where_it_comes_in(text in "\\p{Any}{0,6000}") {
        #[derive(Serialize)]
        enum Rude { _Ready, Failed(String) }
        let (node, platform) = Link::<Rude, u8>::pair().unwrap();
        node.send(&Rude::Failed(text.clone()), &[]).unwrap();
        match PlatformLink::new(platform).receive().unwrap().0 {
            ToPlatform::Failed(why) => prop_assert_eq!(why, Reason::from(text)),
            other => prop_assert!(false, "{:?}", other),
        }
    }
}

#[test]
fn every_kind_of_message_is_built() {
    let matter = Matter { text: String::new(), number: 1, runs: Vec::new() };
    let kinds: BTreeSet<usize> = matter.to_node().iter().map(kind_to_node).collect();
    assert!(kinds.into_iter().eq(0..7));
    let names: BTreeSet<&str> = matter.to_platform().iter().map(ToPlatform::name).collect();
    assert_eq!(names.len(), 12, "{names:?}");
}

#[test]
fn a_node_that_a_guest_has_broken_sends_nothing_longer_than_its_like() {
    let report = |steps, code| {
        let steps = vec![(ForkStep::Place, 0, 0); steps];
        let (asked_by, why) = (Requester::Guest, None);
        ToPlatform::Report(Report {
            asked_by,
            seq: 1,
            count: 0,
            code,
            why,
            rung_ns: 0,
            pause_ns: 0,
            untold: 0,
            steps,
        })
    };
    assert!(report(ForkStep::ALL.len(), 0).is_valid());
    assert!(!report(ForkStep::ALL.len() + 1, 0).is_valid() && !report(0, u32::MAX).is_valid());
    let steps = vec![(ForkStep::Place, 0, 0); ForkStep::ALL.len() + 1];
    assert!(!ToPlatform::Launched { seq: 1, steps }.is_valid());
    assert!(!ToPlatform::Answer { code: u32::MAX, why: Reason::default() }.is_valid());
}

#[test]
fn the_files_of_the_longest_image_get_through() {
    let (ours, theirs) = PlatformLink::pair().unwrap();
    let file = memory::sealed("test", b"").unwrap();
    // A wake event and a rendezvous go before those of the image.
    let files = vec![file.as_fd(); MAX_LAYERS + 2];
    ours.send(&ToNode::StandBy { working_set: None }, &files).unwrap();
    assert_eq!(NodeLink::new(theirs).receive().unwrap().1.len(), files.len());
}
