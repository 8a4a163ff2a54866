//! How well a platform is suited, in points.
//!
//! A part is from 0 to 1000 points, times its weight. The weights are made of three rules of thumb. Sending
//! an image and waiting for it is worth as much as finding a third of the processors more free. A host on
//! which something waits for memory for a tenth of the time is as bad as one that has a fifth of its memory
//! less to give: waiting for memory shows that more of it was promised than there is. And free nodes count as
//! much as free memory: several platforms may go by what was true a moment ago, and the last free node of a
//! small platform is soon taken by another (with a weight of 1, a fifth to a half more copies came too late
//! in simulations).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::room::{Candidate, Evaluation, available_bytes, charge_bytes};
use crate::member::Load;

/// Most points of a part whose weight is 1.
const FULL: u32 = 1000;

const MEMORY: u32 = 4;
const MEMORY_PRESSURE: u32 = 8;
const PROCESSORS: u32 = 6;
const CPU_PRESSURE: u32 = 4;
const NODES: u32 = 4;
const READY: u32 = 1;
const IMAGE: u32 = 2;

/// Most points for what is ready on a platform.
pub(super) const MOST_LOCALITY: u32 = FULL * (READY + IMAGE);

/// What a platform's score consists of, in points: as it would be with the next copy there. More is better.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Score {
    /// For memory left.
    pub memory: u32,
    /// For no waiting for memory.
    pub memory_pressure: u32,
    /// For processors, beside the VMs that there are.
    pub processors: u32,
    /// For no waiting for processors.
    pub cpu_pressure: u32,
    /// For free nodes.
    pub nodes: u32,
    /// For a ready shell of the copies' shape.
    pub ready: u32,
    /// For the copies' image, or half of it for one of its ancestors.
    pub image: u32,
}

impl Score {
    /// The parts by name.
    pub fn parts(&self) -> [(&'static str, u32); 7] {
        [
            ("memory", self.memory),
            ("memory-pressure", self.memory_pressure),
            ("processors", self.processors),
            ("cpu-pressure", self.cpu_pressure),
            ("nodes", self.nodes),
            ("ready", self.ready),
            ("image", self.image),
        ]
    }

    /// All points.
    pub fn total(&self) -> u32 {
        self.load() + self.locality()
    }

    /// Points for having little to do.
    pub(super) fn load(&self) -> u32 {
        self.memory + self.memory_pressure + self.processors + self.cpu_pressure + self.nodes
    }

    /// Points for what is ready there.
    pub(super) fn locality(&self) -> u32 {
        self.ready + self.image
    }
}

impl Evaluation<'_> {
    /// The score of a platform that has got `copies` of these copies; less than its room.
    pub(super) fn score(&self, candidate: &Candidate<'_>, copies: u32) -> Score {
        let Score { ready, image, .. } = self.locality_score(candidate, copies);
        Score { ready, image, ..self.load_score(candidate, copies) }
    }

    /// The part of it for what is ready there, which takes longer to find out.
    pub(super) fn locality_score(&self, candidate: &Candidate<'_>, copies: u32) -> Score {
        let ready = READY * FULL * u32::from(self.has_shell(&candidate.member.load, copies));
        Score { ready, image: IMAGE * self.image_there(candidate, copies), ..Score::default() }
    }

    /// The part of it for having little to do.
    pub(super) fn load_score(&self, candidate: &Candidate<'_>, copies: u32) -> Score {
        let (load, with_next) = (&candidate.member.load, copies.saturating_add(1));
        let charge_bytes = charge_bytes(self.wish.config, with_next, candidate.is_source);
        let left_bytes = available_bytes(load).saturating_sub(charge_bytes);
        let free_nodes = load.max_vms.saturating_sub(load.vms).saturating_sub(with_next);
        let processors = u64::from(load.processors);
        let busy = u64::from(load.vms) + u64::from(with_next) * u64::from(self.wish.config.vcpus);
        Score {
            memory: MEMORY * permille(left_bytes >> 10, load.memory_bytes >> 10),
            memory_pressure: MEMORY_PRESSURE * FULL.saturating_sub(load.memory_pressure_permille),
            processors: PROCESSORS * permille(processors, processors + busy),
            cpu_pressure: CPU_PRESSURE * FULL.saturating_sub(load.cpu_pressure_permille),
            nodes: NODES * permille(free_nodes.into(), load.max_vms.into()),
            ..Score::default()
        }
    }

    /// Whether there is a ready shell for the next copy.
    fn has_shell(&self, load: &Load, copies: u32) -> bool {
        let fitting = load.ready.iter().filter(|ready| ready.config == self.wish.config);
        fitting.map(|ready| u64::from(ready.shells)).fold(0, u64::saturating_add) > copies.into()
    }

    /// How much of the image is there, in thousandths: a platform that has got a copy has got it too.
    fn image_there(&self, candidate: &Candidate<'_>, copies: u32) -> u32 {
        if candidate.is_source || copies > 0 {
            return FULL;
        }
        let there = &candidate.member.load.images;
        match self.wish.images.split_first() {
            Some((image, _)) if there.contains(image) => FULL,
            Some((_, ancestors)) if there.iter().any(|image| ancestors.contains(image)) => FULL / 2,
            _ => 0,
        }
    }
}

/// A part of a whole in thousandths; the whole is less than 2^54.
fn permille(part: u64, whole: u64) -> u32 {
    let permille = (part.min(whole) * u64::from(FULL)).checked_div(whole);
    permille.and_then(|permille| u32::try_from(permille).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_thousandths_at_the_limits_too() {
        let most = u64::MAX >> 10;
        for (part, whole, expected) in [
            (0, 0, 0),
            (1, 0, 0),
            (1, 3, 333),
            (3, 3, 1000),
            (4, 3, 1000),
            (most, most, 1000),
            (most / 2, most, 499),
        ] {
            assert_eq!(permille(part, whole), expected, "{part} of {whole}");
        }
    }
}
