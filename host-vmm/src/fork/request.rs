//! What a guest asked for: checked once, here.

use vmfork_abi::{ErrorCode, MAX_CHILDREN, Request, doorbell, flags, is_vm_type, padded_text};

use crate::cluster::placement::Where;

/// A request that can be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Order {
    /// The guest's number for it.
    pub(super) seq: u64,
    /// How many children, from 1 to [`MAX_CHILDREN`].
    pub(super) count: u32,
    /// Under which type; a valid one.
    pub(super) vm_type: String,
    /// Where.
    pub(super) location: Where,
}

/// Checks a ring's command, and the copy of the request that came with it.
pub(super) fn validate(command: Option<u32>, request: &Request) -> Result<Order, ErrorCode> {
    if command != Some(doorbell::FORK) {
        return Err(ErrorCode::UnknownCommand);
    }
    let location = match request.flags {
        0 => Where::Any,
        flags::LOCAL => Where::Local,
        flags::REMOTE => Where::Remote,
        _ => return Err(ErrorCode::InvalidFlags),
    };
    if request.reserved.iter().any(|&byte| byte != 0) {
        return Err(ErrorCode::InvalidFlags);
    }
    if !(1..=MAX_CHILDREN).contains(&request.count) {
        return Err(ErrorCode::InvalidCount);
    }
    let vm_type = padded_text(&request.vm_type).filter(|name| is_vm_type(name)).ok_or(ErrorCode::InvalidType)?;
    Ok(Order { seq: request.seq, count: request.count, vm_type: vm_type.to_owned(), location })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmfork_abi::pad_text;

    use super::*;

    fn good() -> Request {
        Request { seq: 9, count: 4, vm_type: pad_text("web").unwrap(), ..Default::default() }
    }

    #[test]
    fn a_good_request_is_an_order() {
        let order = validate(Some(doorbell::FORK), &good()).unwrap();
        assert_eq!(order, Order { seq: 9, count: 4, vm_type: "web".into(), location: Where::Any });
        for (flags, location) in [(flags::LOCAL, Where::Local), (flags::REMOTE, Where::Remote)] {
            assert_eq!(validate(Some(doorbell::FORK), &Request { flags, ..good() }).unwrap().location, location);
        }
    }

    #[test]
    fn each_mistake_has_its_code() {
        let refused = |command, request: Request| validate(command, &request).unwrap_err();
        assert_eq!(refused(None, good()), ErrorCode::UnknownCommand);
        assert_eq!(refused(Some(0), good()), ErrorCode::UnknownCommand);
        let ask = |request| refused(Some(doorbell::FORK), request);
        assert_eq!(ask(Request { count: 0, ..good() }), ErrorCode::InvalidCount);
        assert_eq!(ask(Request { count: MAX_CHILDREN + 1, ..good() }), ErrorCode::InvalidCount);
        assert_eq!(ask(Request { flags: flags::LOCAL | flags::REMOTE, ..good() }), ErrorCode::InvalidFlags);
        assert_eq!(ask(Request { flags: 4, ..good() }), ErrorCode::InvalidFlags);
        assert_eq!(ask(Request { reserved: [1; 80], ..good() }), ErrorCode::InvalidFlags);
        assert_eq!(ask(Request { vm_type: [0; 32], ..good() }), ErrorCode::InvalidType);
        assert_eq!(ask(Request { vm_type: [0xff; 32], ..good() }), ErrorCode::InvalidType);
        assert_eq!(ask(Request { vm_type: pad_text("../x").unwrap(), ..good() }), ErrorCode::InvalidType);
    }

    proptest! {
        #[test]
        fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), Request::BYTES), command: Option<u32>) {
            let request = Request::from_bytes(bytes.as_slice().try_into().unwrap());
            if let Ok(order) = validate(command, &request) {
                prop_assert!(is_vm_type(&order.vm_type) && (1..=MAX_CHILDREN).contains(&order.count));
            }
        }
    }
}
