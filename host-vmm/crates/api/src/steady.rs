//! Bodies of requests and answers that must not come too slowly: a byte now and then would keep whoever reads
//! them waiting for ever.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use hyper::body::{Body, Bytes, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

/// Least rate at which something long must be taken or come, in bytes a second: half of what the least
/// bandwidth of a clone that can be configured (1 MiB/s) leaves to each of the most connections (64).
pub const LEAST_RATE: u64 = 8 << 10;

/// How slowly a body may come.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Longest time between two pieces.
    pub between: Duration,
    /// Longest time for all of it.
    pub whole: Duration,
    /// So many bytes that have come give it another second.
    pub rate: Option<u64>,
}

/// It comes too slowly.
#[derive(Debug, thiserror::Error)]
#[error("what is sent comes too slowly: it had {0:?}")]
pub struct Slow(pub Duration);

/// A body that fails where it comes too slowly.
#[derive(Debug)]
pub struct Steady<B> {
    body: B,
    /// None where it may come as slowly as it likes.
    limits: Option<Limits>,
    began: Instant,
    bytes: u64,
    /// Rings when it has come too slowly; none before it has been waited for.
    alarm: Option<Pin<Box<Sleep>>>,
}

impl<B> Steady<B> {
    /// One whose time begins now.
    pub fn new(body: B, limits: Option<Limits>) -> Self {
        Self { body, limits, began: Instant::now(), bytes: 0, alarm: None }
    }

    /// How long it has from its beginning for all of it.
    fn whole(&self, Limits { whole, rate, .. }: Limits) -> Duration {
        whole.saturating_add(Duration::from_secs(rate.map_or(0, |rate| self.bytes / rate)))
    }
}

impl<B> Body for Steady<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        let frame =
            Pin::new(&mut this.body).poll_frame(context).map(|frame| Some(frame?.map_err(Into::into)));
        let Some(limits) = this.limits else { return frame };
        let whole = this.whole(limits);
        match &frame {
            Poll::Ready(None | Some(Err(_))) => frame,
            Poll::Ready(Some(Ok(_))) if this.began.elapsed() >= whole => {
                Poll::Ready(Some(Err(Slow(whole).into())))
            }
            Poll::Ready(Some(Ok(piece))) => {
                this.bytes += piece.data_ref().map_or(0, |data| data.len() as u64);
                this.alarm = None;
                frame
            }
            Poll::Pending => {
                let end = (Instant::now() + limits.between).min(this.began + whole);
                let alarm = this.alarm.get_or_insert_with(|| Box::pin(sleep_until(end)));
                alarm.as_mut().poll(context).map(|()| Some(Err(Slow(limits.between.min(whole)).into())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt, channel::Channel};

    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    /// How much comes until a body fails, where a byte comes each 10 ms and there are so many.
    async fn come(count: usize, limits: Limits) -> Result<usize, Duration> {
        let (mut sender, body) = Channel::<Bytes, std::io::Error>::new(1);
        let send = async move {
            for _ in 0..count {
                tokio::time::sleep(Duration::from_millis(10)).await;
                if sender.send_data(Bytes::from_static(b" ")).await.is_err() {
                    return;
                }
            }
        };
        let receive = async move {
            let received = Steady::new(body, Some(limits)).collect().await;
            let received = received.map(|received| received.to_bytes().len());
            received.map_err(|error| error.downcast::<Slow>().expect("it came too slowly").0)
        };
        tokio::join!(send, receive).1
    }

    #[tokio::test]
    async fn a_body_that_comes_too_slowly_fails() {
        let (between, whole) = (LONG, LONG);
        assert_eq!(come(3, Limits { between, whole, rate: None }).await, Ok(3));
        let short = Duration::from_millis(1);
        assert_eq!(come(1, Limits { between: short, whole, rate: None }).await, Err(short));
        let short = Duration::from_millis(300);
        assert_eq!(come(usize::MAX, Limits { between, whole: short, rate: Some(1 << 20) }).await, Err(short));
    }

    #[test]
    fn what_has_come_gives_it_more_time() {
        let limits = Limits { between: LONG, whole: LONG, rate: Some(10) };
        let body = Steady { bytes: 25, ..Steady::new((), Some(limits)) };
        assert_eq!(body.whole(limits), LONG + Duration::from_secs(2));
        assert_eq!(body.whole(Limits { rate: None, ..limits }), LONG);
    }
}
