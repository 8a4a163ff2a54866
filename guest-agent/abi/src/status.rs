//! The numbers in the control page that have names.

macro_rules! numbered {
    (
        $(#[$about:meta])* $name:ident {
            $($(#[$doc:meta])* $variant:ident = $number:literal, $text:literal;)+
        }
    ) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum $name { $($(#[$doc])* $variant = $number,)+ }

        impl $name {
            /// Every value, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The value with this number, or `None` where no value has it.
            pub const fn from_number(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)+ _ => None }
            }

            /// The number that stands for this value in the control page.
            pub const fn number(self) -> u32 {
                self as u32
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str(match self { $(Self::$variant => $text,)+ })
            }
        }
    };
}

numbered! {
    /// Which side this VM is of the latest fork that it has asked for, or comes from.
    Role {
        /// Booted, and has never asked for a fork.
        Booted = 0, "booted";
        /// It asked for the fork.
        Parent = 1, "parent";
        /// It came from the fork.
        Child = 2, "child";
    }
}

numbered! {
    /// Where a copy was launched, as seen from its parent.
    Location {
        /// On the parent's platform.
        Local = 1, "local";
        /// On another one.
        Remote = 2, "remote";
    }
}

numbered! {
    /// How the VMM answered the latest request.
    Status {
        /// No request was answered yet.
        Idle = 0, "idle";
        /// The fork was made.
        Forked = 1, "forked";
        /// The fork was refused or failed; the error code says why. Only the parent exists.
        Failed = 2, "failed";
    }
}

numbered! {
    /// Why a fork was refused or failed. The parent goes on in every case.
    ErrorCode {
        /// There was no error.
        None = 0, "no error";
        /// The doorbell carried an unknown command or had the wrong width.
        UnknownCommand = 1, "the doorbell's command is unknown";
        /// The calling VM is not a launched VM of its VMM, for instance since it is being stopped.
        NotLaunched = 2, "the VM is not launched";
        /// A fork of this VM is under way already: one that another vCPU has asked for, or an operator.
        Busy = 3, "a fork of this VM is under way";
        /// The count is 0 or more than the VMM allows.
        InvalidCount = 4, "the count of children is out of range";
        /// The VM type is not a valid name.
        InvalidType = 5, "the VM type is not valid";
        /// A flag or a reserved field is set that this VMM does not know.
        InvalidFlags = 6, "the request sets flags that this VMM does not know";
        /// The VM's vCPUs could not be brought to a stop.
        Quiesce = 7, "the vCPUs could not be stopped";
        /// The VM's state could not be read.
        Capture = 8, "the VM's state could not be captured";
        /// The VM's memory could not be made an image.
        Freeze = 9, "the VM's memory could not be frozen";
        /// No platform takes the children.
        Place = 10, "no platform can take the children";
        /// A child could not be launched; those that could were ended again.
        Launch = 11, "the children could not be launched";
        /// The roles could not be written.
        Signal = 12, "the roles could not be signalled";
        /// The VMM lost its platform, or failed otherwise; its log says how.
        Internal = 13, "the VMM failed";
        /// The operator allows fewer children, in one fork or of one VM.
        Children = 14, "the operator allows fewer children";
        /// The operator allows fewer forks a second.
        Rate = 15, "the operator allows fewer forks a second";
        /// The operator allows no further generation.
        Generation = 16, "the operator allows no further generation";
        /// The operator allows less memory to VMs of this type.
        Memory = 17, "the operator allows less memory";
        /// The VM is a clone whose memory has not come as a whole yet.
        Incomplete = 18, "the VM's memory has not come as a whole yet";
        /// The request is that of another VM, of which this one is a copy.
        Copied = 19, "the request is that of the VM that this one is a copy of";
        /// The children were not ready to run in time: the operator says how long a VM may stand still for a
        /// fork.
        Timeout = 20, "the children were not ready to run in time";
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_name_their_values() {
        assert!(Role::ALL.iter().all(|&role| Role::from_number(role.number()) == Some(role)));
        assert!(Status::ALL.iter().all(|&status| Status::from_number(status.number()) == Some(status)));
        assert!(ErrorCode::ALL.iter().all(|&code| ErrorCode::from_number(code.number()) == Some(code)));
        assert!(
            Location::ALL.iter().all(|&location| Location::from_number(location.number()) == Some(location))
        );
        assert_eq!(Role::from_number(99), None);
        assert_eq!(Location::from_number(0), None);
    }
}
