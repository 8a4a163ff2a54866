//! Where the copies of a fork go.

use cluster::placement::Wish;
use types::ForkStep;
use vmfork_abi::{MAX_CHILDREN, is_vm_type};

use super::{ForkParent, Order, Target, remote::PlacementResult};
use crate::{Error, Platform, launcher::slots};

impl Platform {
    /// Chooses where the copies of a fork go, where there may be any.
    pub(super) fn place(&self, parent: &mut ForkParent<'_>, order: &Order) -> Result<PlacementResult, Error> {
        if order.fault == Some(ForkStep::Place) {
            return Err(Error::Injected(ForkStep::Place));
        }
        // The node has checked both; but a node that a guest has broken must not choose the names of this
        // platform's files, nor have it make up so many copies that there is no memory for their IDs.
        if !is_vm_type(&order.vm_type) {
            return Err(Error::Type(order.vm_type.clone()));
        }
        if !(1..=MAX_CHILDREN).contains(&order.count) {
            return Err(Error::Count(order.count));
        }
        if !self.limits.are_none() {
            let ForkParent { vm, config, recent, .. } = parent;
            self.check_limits(vm, *config, recent, (&order.vm_type, order.count))?;
        }
        self.check_unsealed(parent.unsealed)?;
        let slots = slots(order.count)?;
        let location = match &order.target {
            Target::Chosen(location) => *location,
            Target::Platform { name, .. } => return Ok(PlacementResult::on(name, slots)),
        };
        let wish = Wish {
            vm_type: order.vm_type.clone(),
            count: order.count,
            config: parent.config,
            location,
            images: Vec::new(),
            source: self.name().to_owned(),
        };
        self.choose(slots, &wish, &[])
    }
}
