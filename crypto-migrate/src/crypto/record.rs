//! TLS 1.3 record protection (RFC 8446, sections 5.2, 5.3, 7.2, 7.3) from a traffic secret: AES-256-GCM, SHA-384.
//!
//! The handshake is rustls's; it hands over the two traffic secrets. Here they become keys, and their successors.

use ring::hkdf;
use zeroize::Zeroizing;

use super::aead::NONCE_SIZE;
use super::{AeadKey, CryptoError, Length, Provider, TAG_SIZE};

/// Records one key may open: the bound of RFC 8446, 5.5 (2^24.5), rounded down. A peer must have updated its key.
pub(crate) const MAX_RECORDS: u64 = 1 << 24;

/// One direction's secret of a connection.
pub(crate) struct TrafficSecret(Zeroizing<[u8; SECRET_SIZE]>);

impl TrafficSecret {
    /// As the handshake derived it.
    pub(crate) fn new(secret: &[u8]) -> Result<Self, CryptoError> {
        let mut out = Zeroizing::new([0; SECRET_SIZE]);
        if secret.len() != SECRET_SIZE {
            return Err(CryptoError::Agreement);
        }
        out.copy_from_slice(secret);
        Ok(Self(out))
    }

    /// The secret after a key update.
    pub(crate) fn next(&self) -> Result<Self, CryptoError> {
        Ok(Self(self.expand("traffic upd")?))
    }

    /// The key of its records.
    pub(crate) fn key(&self, provider: Provider) -> Result<RecordKey, CryptoError> {
        Ok(RecordKey {
            key: AeadKey::new(provider, &self.expand("key")?)?,
            iv: *self.expand("iv")?,
            sequence: 0,
        })
    }

    /// HKDF-Expand-Label with an empty context (RFC 8446, 7.1).
    fn expand<const N: usize>(&self, label: &str) -> Result<Zeroizing<[u8; N]>, CryptoError> {
        let refused = CryptoError::Agreement;
        let length = u16::try_from(N).map_err(|_| refused)?.to_be_bytes();
        let name = u8::try_from(PREFIX.len() + label.len()).map_err(|_| refused)?;
        let info = [&length, &[name][..], PREFIX, label.as_bytes(), &[0]];
        let secret = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA384, self.0.as_slice());
        let mut out = Zeroizing::new([0; N]);
        secret
            .expand(&info, Length(N))
            .and_then(|okm| okm.fill(out.as_mut()))
            .map_err(|_| refused)?;
        Ok(out)
    }
}

/// The key of one direction, and the number of its next record.
pub(crate) struct RecordKey {
    key: AeadKey,
    iv: [u8; NONCE_SIZE],
    sequence: u64,
}

impl RecordKey {
    /// Number of the next record.
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Encrypts all but the last byte of `data` in place, followed by the content type; returns the latter and the
    /// tag. The last byte of `data` is what it was.
    pub(crate) fn seal(
        &mut self,
        header: &[u8],
        data: &mut [u8],
        content: u8,
    ) -> Result<[u8; 1 + TAG_SIZE], CryptoError> {
        let nonce = self.advance()?;
        self.key.seal_with_last(nonce, header, data, content)
    }

    /// Decrypts a record in place: content, its type, padding.
    pub(crate) fn open<'a>(
        &mut self,
        header: &[u8],
        data: &'a mut [u8],
    ) -> Result<&'a mut [u8], CryptoError> {
        let nonce = self.advance()?;
        self.key.open_with(nonce, header, data)
    }

    /// The same into `out`, which is as long as the ciphertext; on an error it may hold what nobody authenticated.
    pub(crate) fn open_into(
        &mut self,
        header: &[u8],
        data: &mut [u8],
        out: &mut [u8],
    ) -> Result<(), CryptoError> {
        let nonce = self.advance()?;
        self.key.open_into(nonce, header, data, out)
    }

    /// Every number makes one nonce, whatever comes of it.
    fn advance(&mut self) -> Result<[u8; NONCE_SIZE], CryptoError> {
        if self.sequence >= MAX_RECORDS {
            return Err(CryptoError::SealLimit);
        }
        let mut nonce = self.iv;
        let number = self.sequence.to_be_bytes();
        let tail = nonce.iter_mut().skip(NONCE_SIZE - number.len());
        tail.zip(number).for_each(|(n, s)| *n ^= s);
        self.sequence += 1;
        Ok(nonce)
    }
}

const SECRET_SIZE: usize = 48;
const PREFIX: &[u8] = b"tls13 ";

#[cfg(test)]
mod tests {
    use super::*;

    fn key(provider: Provider) -> RecordKey {
        let secret = TrafficSecret::new(&[7; SECRET_SIZE]).unwrap();
        secret.next().unwrap().key(provider).unwrap()
    }

    #[test]
    fn a_record_opens_at_its_number_and_nowhere_else() {
        for (&from, &to) in Provider::ALL.iter().zip(Provider::ALL.iter().rev()) {
            let mut sender = key(from);
            let seal = |sender: &mut RecordKey| {
                let mut data = *b"bytes!";
                let trailer = sender.seal(b"head", &mut data, 23).unwrap();
                assert_eq!(data[5], b'!', "the last byte is not part of it");
                [&data[..5], &trailer].concat()
            };
            let (first, second) = (seal(&mut sender), seal(&mut sender));
            let mut receiver = key(to);
            assert_eq!(
                receiver.open(b"head", &mut first.clone()).unwrap(),
                b"bytes\x17"
            );
            let mut out = [0; 6];
            receiver
                .open_into(b"head", &mut second.clone(), &mut out)
                .unwrap();
            assert_eq!(&out, b"bytes\x17");
            for (number, header) in [(1, b"head"), (0, b"heat")] {
                let mut receiver = key(to);
                receiver.sequence = number;
                assert!(receiver.open(header, &mut first.clone()).is_err());
            }
        }
    }

    #[test]
    fn no_key_serves_longer_than_its_bound() {
        let mut key = key(Provider::default());
        key.sequence = MAX_RECORDS - 1;
        assert!(key.seal(b"", &mut [0; 8], 23).is_ok());
        assert_eq!(key.seal(b"", &mut [0; 8], 23), Err(CryptoError::SealLimit));
        assert_eq!(
            key.open(b"", &mut [0; 32]).err(),
            Some(CryptoError::SealLimit)
        );
    }
}
